//! Charts as SVG: bars of parts, and lines over time. Everything that is text goes through [`escaped`].

use std::fmt::Write;

/// Width of the drawing, without what stands at its left.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 84.0;
const HEIGHT: f64 = 180.0;
/// Lines of these colours can be told apart by most eyes; after the last they begin anew.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c564b"];

/// Text that can be nothing else to a browser.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            c if c.is_control() => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

pub(super) fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

/// One part of a bar.
pub(super) struct Part {
    pub(super) name: String,
    pub(super) ms: u64,
}

/// A bar of parts, to scale, with a legend that has their times.
pub(super) fn bar(parts: &[Part]) -> String {
    let total: u64 = parts.iter().map(|part| part.ms).sum();
    let mut svg = format!("<svg viewBox=\"0 0 {} 40\" role=\"img\">", WIDTH + LEFT);
    let mut x = 0.0;
    for (at, part) in parts.iter().enumerate() {
        let width = part.ms as f64 / total.max(1) as f64 * (WIDTH + LEFT);
        let _ = write!(
            svg,
            "<rect x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"34\" fill=\"{}\"><title>{}: {}</title></rect>",
            colour(at),
            escaped(&part.name),
            time(part.ms)
        );
        x += width;
    }
    svg += "</svg><p class=\"legend\">";
    for (at, part) in parts.iter().enumerate() {
        let (colour, name, time) = (colour(at), escaped(&part.name), time(part.ms));
        let _ = write!(svg, "<span><i style=\"background:{colour}\"></i>{name} {time}</span> ");
    }
    svg + "</p>"
}

/// One line of a chart.
pub(super) struct Line {
    pub(super) name: String,
    /// Milliseconds and values.
    pub(super) points: Vec<(u64, u64)>,
}

/// What lies behind the lines of all charts.
pub(super) struct Ground<'a> {
    /// To the right edge.
    pub(super) end_ms: u64,
    /// From, to, and why.
    pub(super) waits: &'a [(u64, u64, String)],
    pub(super) restarts_ms: &'a [u64],
}

/// Lines over time. `value` tells what a figure is called.
pub(super) fn lines(lines: &[Line], ground: &Ground<'_>, value: impl Fn(u64) -> String) -> String {
    let most = lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value).max().unwrap_or(0).max(1);
    let x = |ms: u64| LEFT + ms.min(ground.end_ms) as f64 / ground.end_ms.max(1) as f64 * WIDTH;
    let y = |value: u64| HEIGHT - value as f64 / most as f64 * (HEIGHT - 10.0);
    let mut svg = format!("<svg viewBox=\"0 0 {} {}\" role=\"img\">", WIDTH + LEFT, HEIGHT + 22.0);
    for (from, to, why) in ground.waits {
        let (left, width) = (x(*from), (x(*to) - x(*from)).max(1.0));
        let _ = write!(
            svg,
            "<rect class=\"wait\" x=\"{left:.1}\" y=\"0\" width=\"{width:.1}\" height=\"{HEIGHT}\"><title>{}</title></rect>",
            escaped(why)
        );
    }
    for ms in ground.restarts_ms {
        let at = x(*ms);
        let _ = write!(
            svg,
            "<line class=\"restart\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{HEIGHT}\"><title>the agent was restarted</title></line>"
        );
    }
    for part in 0..=4_u64 {
        let (level, ms) = (most / 4 * part, ground.end_ms / 4 * part);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{2:.1}\" y2=\"{2:.1}\"/><text x=\"{3}\" y=\"{4:.1}\" text-anchor=\"end\">{1}</text>",
            LEFT + WIDTH,
            escaped(&value(level)),
            y(level),
            LEFT - 6.0,
            y(level) + 4.0
        );
        let anchor = if part == 4 { "end" } else { "middle" };
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
            x(ms),
            HEIGHT + 17.0,
            time(ms)
        );
    }
    for (at, line) in lines.iter().enumerate() {
        let points = line.points.iter().map(|(ms, value)| format!("{:.1},{:.1}", x(*ms), y(*value)));
        let points: Vec<String> = points.collect();
        let _ = write!(svg, "<polyline points=\"{}\" stroke=\"{}\"/>", points.join(" "), colour(at));
    }
    svg += "</svg><p class=\"legend\">";
    for (at, line) in lines.iter().enumerate() {
        let _ =
            write!(svg, "<span><i style=\"background:{}\"></i>{}</span> ", colour(at), escaped(&line.name));
    }
    svg + "</p>"
}

/// A time that people read.
pub(super) fn time(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{}:{:02} min", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{}:{:02} h", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}
