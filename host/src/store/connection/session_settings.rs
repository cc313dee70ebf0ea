//! The settings of our sessions. What is set for the server, the database or the role must neither change what our
//! statements mean nor let them fail. `tests/it/database/imposed.rs` imposes each.
//!
//! Must never set what only a superuser may set: the login would fail.

/// What a session asks for at its login.
pub(in crate::store) const AT_LOGIN: [(&str, &str); 22] = [
    // When our host is gone, the server must notice and release the rows that we had locked. With its
    // defaults that takes over two hours.
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "20000"),
    ("client_connection_check_interval", "10000"),
    ("idle_in_transaction_session_timeout", "30000"),
    ("idle_session_timeout", "0"),
    ("statement_timeout", "30000"),
    ("lock_timeout", "5000"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("row_security", "on"),
    ("search_path", ""),
    ("TimeZone", "UTC"),
    // The messages of `queue/prepared.rs` have NULL in arrays, and their answers have bytes as text.
    ("bytea_output", "hex"),
    ("array_nulls", "on"),
    ("jit", "off"),
    // A claim's rows fit into it, so that none is written into a temporary file, of which there may be no room.
    ("work_mem", "16MB"),
    // The queue is read by its index, from its head. Without, each look would read the whole table.
    ("enable_indexscan", "on"),
    // The planner must read rows by the index that has them in order. PostgreSQL's statistics lag behind, and cannot know what
    // is paused: now and then the planner would read the whole table and sort it.
    ("enable_sort", "off"),
    // By default PostgreSQL plans each claim anew, which takes longer than the claim itself: it estimates a
    // plan for the given values to be slightly cheaper than the generic plan, though they are the same
    // plan.
    ("plan_cache_mode", "force_generic_plan"),
    // The triggers need not notify of the daemon's own updates.
    ("tidings.notify", "off"),
];

/// What a session sets after its login, because a server may not know it, or because it depends on what is set.
pub(in crate::store) const AFTER_LOGIN: &str = "
    -- PostgreSQL 17 and later. A claim lasts as long as its delivery; the timeouts above limit it.
    SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL;
    -- What waits for standbys as well stays as it is.
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
