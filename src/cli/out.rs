//! Output that may end before its reader has all of it: `println!` and `eprintln!` of the command line. Where
//! nobody reads any more the process ends, and says nothing.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

use super::exit_code::{EXIT_UNREAD, EXIT_USAGE};

/// A line of what was asked for.
macro_rules! println {
    () => { $crate::cli::out::line(std::io::stdout(), format_args!("")) };
    ($($text:tt)*) => { $crate::cli::out::line(std::io::stdout(), format_args!($($text)*)) };
}

/// A line beside it.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::cli::out::line(std::io::stderr(), format_args!($($text)*)) };
}

pub(super) fn line(mut to: impl Write, text: Arguments<'_>) {
    if let Err(e) = writeln!(to, "{text}").and_then(|()| to.flush()) {
        end(&e);
    }
}

fn end(error: &io::Error) -> ! {
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(EXIT_UNREAD.into());
    }
    // Perhaps at least that can be written.
    let _ = writeln!(io::stderr(), "vmferry: the output cannot be written: {error}");
    std::process::exit(EXIT_USAGE.into());
}
