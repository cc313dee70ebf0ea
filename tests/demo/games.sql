-- The application of the demo and of tests/it/nothing_lost/scenario.rs: a table of games. Its triggers keep the reminders
-- and status changes of each game in step with every change of the game, in the same transaction.
CREATE TABLE games (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    title text NOT NULL,
    starts_at timestamptz NOT NULL,
    minutes integer NOT NULL DEFAULT 20
);

-- A minute of the games lasts a tenth of a second, so that the demo takes seconds and not an hour.
CREATE FUNCTION minutes(number integer) RETURNS interval LANGUAGE sql IMMUTABLE
    RETURN number * interval '100 milliseconds';

CREATE FUNCTION schedule_game() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before integer;
BEGIN
    -- A row with the same key that is already pending is replaced, as an edit of the game requires.
    FOREACH before IN ARRAY '{60, 15}'::integer[] LOOP
        IF NEW.starts_at - minutes(before) > clock_timestamp() THEN
            PERFORM tidings.schedule(
                'game-reminder',
                NEW.starts_at - minutes(before),
                jsonb_build_object('game_id', NEW.id, 'title', NEW.title, 'starts_at', NEW.starts_at, 'reminder_minutes', before),
                key => NEW.id || ' ' || before,
                subject => 'game ' || NEW.id,
                expires_at => NEW.starts_at
            );
        END IF;
    END LOOP;
    PERFORM tidings.schedule(
        'game-status', at,
        jsonb_build_object('game_id', NEW.id, 'target_status', status, 'transition_time', at),
        key => NEW.id || ' ' || status,
        subject => 'game ' || NEW.id
    )
    FROM (VALUES ('IN_PROGRESS', NEW.starts_at), ('COMPLETED', NEW.starts_at + minutes(NEW.minutes))) AS change (status, at);
    RETURN NULL;
END
$$;

CREATE FUNCTION cancel_game() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM tidings.cancel_subject('game ' || OLD.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER schedule_game AFTER INSERT OR UPDATE ON games FOR EACH ROW EXECUTE FUNCTION schedule_game();
CREATE TRIGGER cancel_game AFTER DELETE ON games FOR EACH ROW EXECUTE FUNCTION cancel_game();
