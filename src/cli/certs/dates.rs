//! Dates as people read them.

use time::OffsetDateTime;
use time::macros::format_description;

pub(super) fn day(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day]");
    time.format(&format).unwrap_or_else(|_| time.to_string())
}

pub(super) fn second(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    time.format(&format).unwrap_or_else(|_| time.to_string())
}
