-- What SQL can tell about the rule of a recurrence. The daemon evaluates rules (host/src/recurrences); a rule that passes here
-- may still never come, such as 30 February.

-- Checks one field of a cron rule. `low` and `high` are its range; `names` are words for the numbers from `first` on.
CREATE FUNCTION tidings.check_field(field text, title text, low integer, high integer, names text[], first integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    part text;
    parts text[];
    ends integer[];
    step integer;
    complaint text;
BEGIN
    IF field = '?' AND title LIKE 'day of%' THEN
        RETURN;
    END IF;
    FOREACH part IN ARRAY string_to_array(field, ',') LOOP
        complaint := NULL;
        IF title = 'day of the month' AND part IN ('l', 'lw') THEN
            CONTINUE;
        END IF;
        parts := CASE
            WHEN title = 'day of the month' THEN regexp_match(part, '^(\d{1,2})()w()$')
            WHEN title = 'day of the week' THEN regexp_match(part, '^(\d|[a-z]{3})()(?:#[1-5l]|l)()$')
        END;
        parts := coalesce(
            parts,
            regexp_match(part, '^(\*)()(?:/(\d{1,4}))?$'),
            regexp_match(part, '^(\d{1,4}|[a-z]{3})(?:-(\d{1,4}|[a-z]{3})(?:/(\d{1,4}))?)?$')
        );
        IF part = '*' AND field <> '*' THEN
            complaint := 'an asterisk stands alone, or with a step';
        ELSIF parts IS NULL THEN
            complaint := CASE
                WHEN part ~ '^\d+/\d+$' THEN format('write %s-%s/%s', split_part(part, '/', 1), high, split_part(part, '/', 2))
                WHEN part = '' THEN 'a part of it is empty'
                ELSE format('%s is no number, name, range or step', quote_literal(part))
            END;
        ELSIF parts[1] <> '*' THEN
            SELECT array_agg(
                CASE
                    WHEN value ~ '^\d+$' THEN value::integer
                    -- The last of a range may be Sunday as the seventh day.
                    WHEN value = 'sun' AND place = 2 THEN 7
                    ELSE array_position(names, value) + first - 1
                END
                ORDER BY place
            )
            INTO ends
            FROM unnest(parts[1:2]) WITH ORDINALITY AS both_ends (value, place)
            WHERE value <> '';
            IF NULL = ANY (ends) OR array_position(ends, NULL) IS NOT NULL THEN
                complaint := format('%s is no name of a %s', quote_literal(part), title);
            ELSIF ends[1] NOT BETWEEN low AND high OR ends[2] NOT BETWEEN low AND high THEN
                complaint := format('%s is not between %s and %s', part, low, high);
            ELSIF ends[1] > ends[2] THEN
                complaint := format('%s begins after its end', part);
            END IF;
        END IF;
        step := nullif(parts[3], '')::integer;
        IF complaint IS NULL AND (step = 0 OR step > high) THEN
            complaint := format('the step of %s is not between 1 and %s', part, high);
        END IF;
        IF complaint IS NOT NULL THEN
            RAISE EXCEPTION 'rule has a % that cannot be read: %', title, complaint
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule';
        END IF;
    END LOOP;
    IF field = '' THEN
        RAISE EXCEPTION 'rule has an empty %', title USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule';
    END IF;
END
$$;

-- Checks a rule. Returns the seconds between two instants of `every ...`, and null for a cron rule.
CREATE FUNCTION tidings.check_rule(rule text) RETURNS bigint
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    words CONSTANT text[] := regexp_split_to_array(btrim(lower(rule), E' \t\n\r'), '\s+');
    hint CONSTANT text := 'Rules are cron with 5, 6 (seconds first) or 7 fields (years last), @hourly, @daily, @weekly, @monthly, @yearly, or for instance "every 90 minutes".';
    seconds numeric;
    fields text[];
BEGIN
    IF rule IS NULL OR octet_length(rule) > 255 THEN
        RAISE EXCEPTION 'rule must be 1 to 255 bytes'
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule', HINT = hint;
    END IF;
    IF words[1] = 'every' THEN
        IF array_to_string(words, ' ') !~ '^every( (\d{1,9} )?(second|minute|hour|day|week)s?)+$' THEN
            RAISE EXCEPTION 'rule % cannot be read: every takes numbers of seconds, minutes, hours, days or weeks', quote_literal(rule)
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule',
                      HINT = 'For instance "every 90 minutes" or "every 1 day 12 hours". Months differ in length: use cron for them.';
        END IF;
        SELECT sum(
            coalesce(nullif(part[1], '')::numeric, 1)
            * CASE part[2] WHEN 'second' THEN 1 WHEN 'minute' THEN 60 WHEN 'hour' THEN 3600 WHEN 'day' THEN 86400 ELSE 604800 END
        )
        INTO seconds
        FROM regexp_matches(array_to_string(words[2:], ' '), '(\d*) ?(second|minute|hour|day|week)', 'g') AS part;
        -- Ten years of 366 days.
        IF seconds NOT BETWEEN 1 AND 316224000 THEN
            RAISE EXCEPTION 'rule % must be between one second and ten years', quote_literal(rule)
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule';
        END IF;
        RETURN seconds::bigint;
    END IF;
    IF words[1] LIKE '@%' THEN
        IF cardinality(words) > 1
            OR words[1] NOT IN ('@hourly', '@daily', '@midnight', '@weekly', '@monthly', '@yearly', '@annually')
        THEN
            RAISE EXCEPTION 'rule % is unknown', quote_literal(rule)
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule', HINT = hint;
        END IF;
        RETURN NULL;
    END IF;
    IF cardinality(words) NOT BETWEEN 5 AND 7 THEN
        RAISE EXCEPTION 'rule % has % fields, and needs 5 to 7', quote_literal(rule), cardinality(array_remove(words, ''))
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'rule', HINT = hint;
    END IF;
    fields := CASE cardinality(words)
        WHEN 5 THEN array_append(array_prepend('0', words), '*')
        WHEN 6 THEN array_append(words, '*')
        ELSE words
    END;
    PERFORM tidings.check_field(fields[1], 'second', 0, 59, '{}', 0);
    PERFORM tidings.check_field(fields[2], 'minute', 0, 59, '{}', 0);
    PERFORM tidings.check_field(fields[3], 'hour', 0, 23, '{}', 0);
    PERFORM tidings.check_field(fields[4], 'day of the month', 1, 31, '{}', 0);
    PERFORM tidings.check_field(fields[5], 'month', 1, 12, '{jan,feb,mar,apr,may,jun,jul,aug,sep,oct,nov,dec}', 1);
    PERFORM tidings.check_field(fields[6], 'day of the week', 0, 7, '{sun,mon,tue,wed,thu,fri,sat}', 0);
    PERFORM tidings.check_field(fields[7], 'year', 1970, 4999, '{}', 0);
    RETURN NULL;
END
$$;

-- By how much a spread moves what has this name: always the same for the same name, and even over many names.
CREATE FUNCTION tidings.spread_offset(name text, spread interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE
        WHEN spread = '0' THEN spread
        -- 52 bits of a digest of the name, as a fraction of the spread, in whole milliseconds.
        ELSE floor(
            ('x' || left(encode(sha256(convert_to(name, 'UTF8')), 'hex'), 13))::bit(52)::bigint::float8 / 4503599627370496.0::float8
            * extract(epoch FROM spread)::float8 * 1000
        ) * interval '1 millisecond'
    END;
COMMENT ON FUNCTION tidings.spread_offset IS 'A part of the spread, from 0 up to it, that follows from the name alone.';
