//! All figures as one table in Markdown, for the page on cost.

use std::fmt;

use super::program::Program;
use crate::Figure;

/// Table with a column for each program, and a row for each kind of work.
pub(crate) struct Table {
    programs: Vec<Program>,
    rows: Vec<String>,
}

impl Table {
    /// Returns an empty table for `programs`, without the baseline.
    pub(crate) fn new(programs: &[Program]) -> Self {
        let mut programs = programs.to_vec();
        programs.retain(|&program| program != Program::Baseline);
        Self { programs, rows: Vec::new() }
    }

    /// Adds a row. Each cell has the cost of the proxy and that of the whole system; the lowest of all proxies is bold.
    pub(crate) fn add(&mut self, name: &str, figures: &[(Program, Figure)]) {
        let of = |program| figures.iter().find(|(it, _)| *it == program).map(|(_, figure)| *figure);
        let shown: Vec<_> = self.programs.iter().map(|&program| (program, of(program))).collect();
        let least = |value: fn(&Figure) -> f64| {
            let proxies = shown.iter().filter(|(program, _)| *program != Program::Direct);
            let values = proxies.filter_map(|(_, figure)| figure.as_ref().map(value));
            values.min_by(f64::total_cmp).map(digits).unwrap_or_default()
        };
        let least = [least(|it| it.cost), least(|it| it.total.unwrap_or_default())];
        let bold = |value: f64, least: &String| match digits(value) {
            text if text == *least => format!("**{text}**"),
            text => text,
        };
        let cell = |(program, figure): &(Program, Option<Figure>)| match (figure, program) {
            (None, _) => String::new(),
            (Some(Figure { total: Some(total), .. }), Program::Direct) => digits(*total),
            (Some(Figure { cost, .. }), Program::Direct) => digits(*cost),
            (Some(Figure { cost, total: Some(total), .. }), _) => {
                format!("{} of {}", bold(*cost, &least[0]), bold(*total, &least[1]))
            }
            (Some(Figure { cost, .. }), _) => bold(*cost, &least[0]),
        };
        let cells: Vec<String> = shown.iter().map(cell).collect();
        self.rows.push(format!("| {name} | {} |", cells.join(" | ")));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.programs.iter().map(|program| program.name()).collect();
        writeln!(f, "| work | {} |", names.join(" | "))?;
        write!(f, "|---|{}", "---|".repeat(names.len()))?;
        self.rows.iter().try_for_each(|row| write!(f, "\n{row}"))
    }
}

/// Formats a number with three digits, or with all digits before the point if these are more.
fn digits(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
