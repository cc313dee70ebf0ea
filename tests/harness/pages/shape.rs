//! What a page shows, against what was written: the same but for numbers, ids and times.

/// The first line of what a page shows that `output` does not have behind the one before it.
#[must_use]
pub fn missing<'a>(shown: &'a str, output: &str) -> Option<&'a str> {
    let mut lines = output.lines().map(shape);
    shown.lines().filter(|line| !line.trim().is_empty() && line.trim() != "…").find(|line| {
        let wanted = shape(line);
        !lines.any(|line| fits(&wanted, &line))
    })
}

/// A line without what differs from one time to the next: whatever has a digit in it is 0, and spaces and dashes are one.
fn shape(line: &str) -> String {
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
            // But for a colon or a full stop behind it.
            format!("0{}", &word[word.trim_end_matches([':', '.']).len()..])
        } else if word.chars().all(|char| char == '-' || char == '+') {
            word.chars().next().map(String::from).unwrap_or_default()
        } else {
            word
        }
    });
    shaped.collect::<String>().trim().to_owned()
}

/// Whether `line` is what `wanted` says, in which … stands for anything.
fn fits(wanted: &str, line: &str) -> bool {
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
