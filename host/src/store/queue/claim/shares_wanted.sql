,
    -- Of each kind and priority that has rows, how many were wanted. Those of which none were wanted have rows left.
    (
        SELECT json_agg(json_build_array(kind, priority, coalesce(share, 0)))::text
        FROM heads
        LEFT JOIN shares ON share_kind = kind AND share_priority = priority
    )
