-- Every second, schedules a message that is due in five seconds. For `docker compose --profile demo up`.
SELECT tidings.schedule(
    'message',
    now() + interval '5 seconds',
    jsonb_build_object('routing_key', 'demo.tick', 'body', jsonb_build_object('scheduled_at', now()), 'ttl_ms', 60000)
) \watch interval=1
