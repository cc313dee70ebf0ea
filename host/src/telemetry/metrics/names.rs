//! The name and the help text of every metric, and the buckets of the histograms. Names and labels are public: alerts
//! and dashboards use them.

pub(in crate::telemetry) const LATENESS: &str = "tidings_lateness_seconds";
pub(in crate::telemetry) const DELIVERIES: &str = "tidings_deliveries_total";
pub(in crate::telemetry) const CALLS: &str = "tidings_plugin_calls_total";
pub(in crate::telemetry) const CALL_SECONDS: &str = "tidings_plugin_call_seconds";
pub(in crate::telemetry) const BREAKER: &str = "tidings_breaker_open";
pub(in crate::telemetry) const WAKES: &str = "tidings_wakes_total";
pub(in crate::telemetry) const CLAIMS: &str = "tidings_claims_total";
pub(in crate::telemetry) const CLAIMED_ROWS: &str = "tidings_claimed_rows_total";
pub(in crate::telemetry) const CONFIRM: &str = "tidings_confirm_seconds";
pub(in crate::telemetry) const NEXT_DUE: &str = "tidings_next_due_seconds";
pub(in crate::telemetry) const PENDING: &str = "tidings_pending";
pub(in crate::telemetry) const OLDEST_DUE: &str = "tidings_oldest_due_age_seconds";
pub(in crate::telemetry) const HELD: &str = "tidings_held";
pub(in crate::telemetry) const LIMITED: &str = "tidings_limited_rows";
pub(in crate::telemetry) const LIMITED_OLDEST: &str = "tidings_limited_oldest_age_seconds";
pub(in crate::telemetry) const LIMITED_WAIT: &str = "tidings_limited_wait_seconds";
pub(in crate::telemetry) const PARKED: &str = "tidings_parked";
pub(in crate::telemetry) const GENERATION: &str = "tidings_plugin_generation";
pub(in crate::telemetry) const PLUGIN_MEMORY: &str = "tidings_plugin_memory_bytes";
pub(in crate::telemetry) const PLUGIN_CPU: &str = "tidings_plugin_cpu_seconds";
pub(in crate::telemetry) const RELOADS: &str = "tidings_reloads_total";
pub(in crate::telemetry) const CONNECTED: &str = "tidings_connected";
pub(in crate::telemetry) const BLOCKED: &str = "tidings_broker_blocked";
pub(in crate::telemetry) const LISTENING: &str = "tidings_listening";
pub(in crate::telemetry) const BUILD_INFO: &str = "tidings_build_info";
pub(in crate::telemetry) const EXPIRED: &str = "tidings_expired_total";
pub(in crate::telemetry) const REPLAYS: &str = "tidings_replays_total";
pub(in crate::telemetry) const DEAD_LETTERS: &str = "tidings_dead_letters";
pub(in crate::telemetry) const PARKED_LETTERS: &str = "tidings_parked_letters";
pub(in crate::telemetry) const OLDEST_LETTER: &str = "tidings_dead_letters_oldest_age_seconds";
pub(in crate::telemetry) const CANARY: &str = "tidings_canary_lateness_seconds";
pub(in crate::telemetry) const LOST_CANARIES: &str = "tidings_canaries_lost_total";
pub(in crate::telemetry) const CLOCK_STEPS: &str = "tidings_clock_steps_total";
pub(in crate::telemetry) const RECURRENCES: &str = "tidings_recurrences";
pub(in crate::telemetry) const RECURRENCE_PROBLEMS: &str = "tidings_recurrence_problems";
pub(in crate::telemetry) const OCCURRENCES: &str = "tidings_occurrences_made_total";
pub(in crate::telemetry) const MAKING_LAG: &str = "tidings_making_lag_seconds";
pub(in crate::telemetry) const INTAKE: &str = "tidings_intake_messages_total";
pub(in crate::telemetry) const INTAKE_WAITING: &str = "tidings_intake_waiting";
pub(in crate::telemetry) const DROPPED_SPANS: &str = "tidings_spans_dropped_total";
pub(in crate::telemetry) const DROPPED_LINES: &str = "tidings_log_lines_dropped_total";

pub(in crate::telemetry) const HISTOGRAMS: [(&str, &str, &[f64]); 6] = [
    (
        LATENESS,
        "From the due time of delivered rows to the confirm, by the database clock; without rows that waited for their turn.",
        &LATENESS_BUCKETS,
    ),
    (LIMITED_WAIT, "The same for rows that waited for their turn, because their kind is limited.", &LATENESS_BUCKETS),
    (CANARY, "How late canaries came, from their due time to a consumer.", &LATENESS_BUCKETS),
    (
        MAKING_LAG,
        "How late a daemon looked at a recurrence; occurrences are made 20 s before they are due.",
        &LATENESS_BUCKETS,
    ),
    (CONFIRM, "From the first publish of a batch to its last confirm.", &WORK_BUCKETS),
    (CALL_SECONDS, "Wall-clock time of one call of a plugin, with its start if it was not running.", &WORK_BUCKETS),
];

/// Upper bounds of the buckets of lateness, in seconds.
pub(in crate::telemetry) const LATENESS_BUCKETS: [f64; 15] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0, 120.0, 600.0, 3600.0];
/// Upper bounds of the buckets of confirms and calls, in seconds.
pub(in crate::telemetry) const WORK_BUCKETS: [f64; 12] =
    [0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0];

pub(in crate::telemetry) const COUNTERS: [(&str, &str); 14] = [
    (DELIVERIES, "Attempts to deliver rows, by kind and outcome."),
    (WAKES, "Looks at the queue, by what woke the scheduler."),
    (CLAIMS, "Claims that locked rows."),
    (CLAIMED_ROWS, "Rows that claims locked."),
    (CALLS, "Calls of plugins, by plugin, kind and result."),
    (RELOADS, "Changes of the plugins that serve, by result: loaded, refused, removed or rolled_back."),
    (EXPIRED, "Deadlines that had passed, by where that was found: row, event or dead_letter."),
    (REPLAYS, "Dead letters that a pass dealt with, by outcome: replayed, expired, parked or left."),
    (LOST_CANARIES, "Canaries that did not come within 30 s, or could not be sent."),
    (CLOCK_STEPS, "How often the clock of PostgreSQL was set by a second or more."),
    (OCCURRENCES, "Occurrences of recurrences that this daemon has put into the queue."),
    (INTAKE, "Messages that intakes took, by intake and outcome: scheduled, kept, changed or refused."),
    (DROPPED_SPANS, "Spans that were lost: the collector did not take them, or too many were waiting for it."),
    (DROPPED_LINES, "Lines of the log that could not be written to standard error."),
];

pub(in crate::telemetry) const GAUGES: [(&str, &str); 21] = [
    (PENDING, "Rows that wait: counted up to 1000, above that estimated from PostgreSQL's statistics."),
    (INTAKE_WAITING, "Messages that wait in the queue of an intake."),
    (NEXT_DUE, "Time from the last look until the next row that was not yet due; +Inf = there is none."),
    (OLDEST_DUE, "How long the oldest row has been due that nothing holds back; 0 = there is none."),
    (HELD, "Rows that wait for a plugin of their kind or for the end of a pause; 1001 = more than a thousand."),
    (LIMITED, "Rows of a limited kind that wait for their turn; 100001 = more than a hundred thousand."),
    (
        LIMITED_OLDEST,
        "How long the first row of a limited kind has been due that waits for its turn; 0 = there is none.",
    ),
    (PARKED, "Rows that were set aside for a person; 1001 = more than a thousand."),
    (RECURRENCES, "Recurrences; 1001 = more than a thousand."),
    (RECURRENCE_PROBLEMS, "Recurrences that can make no occurrence; 1001 = more than a thousand."),
    (GENERATION, "The generation of the plugin that serves, counted over all plugins; 0 = it does not serve any more."),
    (PLUGIN_MEMORY, "The most memory that the generation has used."),
    (PLUGIN_CPU, "The most CPU time that one call of the generation has used, in steps of 10 ms."),
    (BREAKER, "1 = the kind's breaker is open: its rows wait until one succeeds."),
    (CONNECTED, "Whether the server answers: postgresql or rabbitmq."),
    (BLOCKED, "Whether RabbitMQ blocks publishing, for want of memory or disk."),
    (LISTENING, "Whether the connection for notifications is there."),
    (BUILD_INFO, "The version."),
    (DEAD_LETTERS, "Dead letters that wait for the next pass."),
    (PARKED_LETTERS, "Dead letters that were set aside for a person."),
    (
        OLDEST_LETTER,
        "How long the oldest dead letter that this daemon's last pass found had been due; 0 = there was none, or another daemon made the pass.",
    ),
];
