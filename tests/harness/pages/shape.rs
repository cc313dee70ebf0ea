//! Compares the output that a page shows with the real output, ignoring differences in numbers, ids and times.

/// The first line of `shown` that `output` does not contain after the previous lines. `None` if all lines were found.
#[must_use]
pub fn find_missing_line<'a>(shown: &'a str, output: &str) -> Option<&'a str> {
    let mut lines = output.lines().map(normalize);
    shown.lines().filter(|line| !line.trim().is_empty() && line.trim() != "…").find(|line| {
        let wanted = normalize(line);
        !lines.any(|line| matches_wanted(&wanted, &line))
    })
}

/// A line without the parts that differ between runs: each word with a digit becomes 0, and repeated spaces or dashes
/// become one.
fn normalize(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for char in line.chars() {
        let joins = |char: char| char.is_ascii_alphanumeric() || "._:@+-".contains(char);
        match words.last_mut() {
            Some(word) if joins(char) && word.ends_with(joins) => word.push(char),
            Some(word) if char == ' ' && word == " " => {}
            _ => words.push(char.to_string()),
        }
    }
    let shaped = words.into_iter().map(|word| {
        if word.contains(|char: char| char.is_ascii_digit()) {
            // A colon or a full stop at the end is kept.
            format!("0{}", &word[word.trim_end_matches([':', '.']).len()..])
        } else if word.chars().all(|char| char == '-' || char == '+') {
            word.chars().next().map(String::from).unwrap_or_default()
        } else {
            word
        }
    });
    shaped.collect::<String>().trim().to_owned()
}

/// Whether `line` matches `wanted`, in which … stands for any text.
fn matches_wanted(wanted: &str, line: &str) -> bool {
    let mut parts = wanted.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some((_, behind)) = rest.split_once(part.trim()) else { return false };
        rest = behind;
    }
    rest.ends_with(last)
}
