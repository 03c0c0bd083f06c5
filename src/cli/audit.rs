//! `vmferry audit`: shows this host's audit record, and judges it. Reads the files; the agent is only asked for
//! its word on the last line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use clap::{Args, Subcommand};
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Date, OffsetDateTime};

use super::client::Client;
use super::show;
use crate::api::Status;
use crate::audit::{Anchor, Kept, Report, judge, text_of};

/// Show who asked what of this host, who its peers proved to be, and what became of it.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct AuditArgs {
    #[command(subcommand)]
    action: Option<AuditCommand>,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Judge the record: lines that were changed, removed, doubled, moved or cut off. That its end is missing, or
    /// that all of it was written anew, shows only against an anchor. Exit code 1: something was found.
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// Only what happened since: 2026-11-29, 2026-11-29T10:00:00Z, or 90m, 24h, 7d ago.
    #[arg(long, value_name = "TIME")]
    since: Option<Since>,
    /// Only what is about migrations whose id begins so; on both hosts it has the same id.
    #[arg(long, value_name = "ID")]
    migration: Option<String>,
    /// Print the lines as they are.
    #[arg(long)]
    json: bool,
    /// The record's folder.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmferry/audit")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// A line that is known from elsewhere: the agent's log has them, its status, and the records of peers
    /// (`peers_head`). May be given several times.
    #[arg(long, value_name = "NUMBER:HASH")]
    anchor: Vec<Anchor>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The record's folder.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmferry/audit")]
    dir: PathBuf,
}

/// A moment, perhaps said by how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Since(OffsetDateTime);

impl FromStr for Since {
    type Err = &'static str;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let ago = || {
            let unit = match word.chars().last()? {
                's' => 1,
                'm' => 60,
                'h' => 3600,
                'd' => 24 * 3600,
                _ => return None,
            };
            let seconds = word[..word.len() - 1].parse::<u32>().ok()?;
            OffsetDateTime::now_utc().checked_sub(time::Duration::seconds(i64::from(seconds) * unit))
        };
        let day = || Date::parse(word, format_description!("[year]-[month]-[day]")).ok();
        let moment = OffsetDateTime::parse(word, &Rfc3339).ok();
        let moment = moment.or_else(|| Some(day()?.midnight().assume_utc())).or_else(ago);
        moment.map(Self).ok_or("a day, a time as in 2026-11-29T10:00:00Z, or how long ago, as in 24h")
    }
}

pub(super) async fn run(socket: &Path, args: AuditArgs) -> anyhow::Result<ExitCode> {
    match args.action {
        Some(AuditCommand::Verify(args)) => verify(socket, args).await,
        None => print(&args.show),
    }
}

fn print(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let report = judge(&args.dir, &[], |line| {
        if is_wanted(args, line) {
            match args.json {
                true => println!("{}", line.whole),
                false => println!("{}", text_of(line)),
            }
        }
    });
    let report = report.with_context(|| no_record(&args.dir))?;
    if !report.problems.is_empty() {
        eprintln!("vmferry: this record is not whole: see `vmferry audit verify`");
    }
    Ok(ExitCode::SUCCESS)
}

fn no_record(dir: &Path) -> String {
    format!("cannot read the audit record in {} (it is the agent's user's; try as root)", dir.display())
}

fn is_wanted(args: &ShowArgs, line: &Kept) -> bool {
    let is_of = |begin: &String| {
        let begins = |id: Option<&str>| id.is_some_and(|id| id.starts_with(&begin.to_ascii_lowercase()));
        ["migration", "first"].iter().any(|name| line.field(name).is_some_and(|v| begins(v.as_str())))
    };
    args.since.is_none_or(|Since(since)| line.at >= since) && args.migration.as_ref().is_none_or(is_of)
}

async fn verify(socket: &Path, args: VerifyArgs) -> anyhow::Result<ExitCode> {
    // Before anything is read: the record only grows.
    let told = agents_word(socket, &args.dir).await;
    let mut anchors = args.anchor.clone();
    anchors.extend(told.clone());
    let report = judge(&args.dir, &anchors, |_| {}).with_context(|| no_record(&args.dir))?;
    if args.json {
        show::json(&report)?;
    } else {
        tell(&args, &report, told.is_some());
    }
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the running agent says of the last line of the record in `dir`, if it writes that one.
async fn agents_word(socket: &Path, dir: &Path) -> Option<Anchor> {
    let status: Status = Client::new(socket).get("/v1/status").await.ok()?;
    let audit = status.audit?;
    let is_same = Path::new(&audit.folder).canonicalize().ok()? == dir.canonicalize().ok()?;
    audit.head.parse().ok().filter(|Anchor(head)| is_same && head.number > 0)
}

fn tell(args: &VerifyArgs, report: &Report, is_told: bool) {
    let (dir, lines, files) = (args.dir.display(), report.lines, report.files);
    println!("{lines} lines in {files} files in {dir}");
    if let (Some(first), Some(head)) = (report.first, &report.head) {
        println!("from line {first}; the last is {head}");
    }
    report.problems.iter().for_each(|problem| println!("problem: {}", crate::printable::printable(problem)));
    if report.further_problems > 0 {
        println!("problem: and {} more", report.further_problems);
    }
    if report.problems.is_empty() {
        println!("no line was changed, removed, doubled, moved or cut off before the last");
    }
    match (args.anchor.len(), is_told) {
        (0, false) => println!(
            "its end was compared with nothing: the agent that writes it did not answer, and no --anchor was given"
        ),
        (known, is_told) => {
            let agent = if is_told { " and the running agent's word" } else { "" };
            println!("compared with {known} anchors{agent}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_day_a_time_or_how_long_ago() {
        let Since(day) = "2026-11-29".parse().unwrap();
        let Since(time) = "2026-11-29T01:00:00+01:00".parse().unwrap();
        assert_eq!(day, time);
        let ago = |word: &str| (OffsetDateTime::now_utc() - word.parse::<Since>().unwrap().0).whole_seconds();
        assert!((5399..5460).contains(&ago("90m")) && (604_799..604_860).contains(&ago("7d")));
        for wrong in ["", "m", "tomorrow", "-1h", "5 d", "ü", "99999999999d"] {
            assert!(wrong.parse::<Since>().is_err(), "{wrong}");
        }
    }
}
