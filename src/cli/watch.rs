//! Following a migration: bars on a terminal, plain lines elsewhere, JSON on request.
//!
//! Ctrl-C asks once and then cancels cleanly. Whatever happens to this process, the migration
//! goes on: it belongs to the agent.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use uuid::Uuid;

use super::client::{Client, Lines};
use super::exit_code::{self, EXIT_USAGE};
use super::show;
use crate::api::{Migration, Phase, Ram, migration_path};

/// Plain lines come at a change of phase and otherwise this often.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// How long an agent that has gone is waited for.
const REATTACH_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks for it.
const REATTACH_EVERY: Duration = Duration::from_millis(250);

pub(super) async fn follow(client: &Client, id: Uuid, json: bool) -> anyhow::Result<ExitCode> {
    let mut lines = client.lines(&format!("{}/events", migration_path(id))).await?;
    let mut view = View::new(json);
    let mut interrupts = Interrupts::default();
    let last = loop {
        tokio::select! {
            progress = lines.next::<Migration>() => match progress {
                Ok(Some(progress)) => {
                    view.show(&progress)?;
                    if progress.outcome.is_some() {
                        break progress;
                    }
                }
                // Without an end of the migration it is one of the agent: another process goes on.
                gone => match reattach(client, id, &view, gone.err()).await {
                    Ok(again) => lines = again,
                    Err(e) => {
                        view.end();
                        return Err(e);
                    }
                },
            },
            interrupt = tokio::signal::ctrl_c() => {
                interrupt?;
                if interrupts.confirmed() {
                    view.say("cancelling…");
                    if let Err(e) = client.cancel(id).await {
                        view.say(&format!("not cancelled: {e:#}"));
                    }
                } else {
                    view.say("press Ctrl-C again within 10 s to cancel the migration; it goes on otherwise");
                }
            }
        }
    };
    view.end();
    if !json {
        show::outcome(&last);
    }
    let code = last.outcome.as_ref().map_or(EXIT_USAGE, exit_code::of);
    Ok(code.into())
}

/// Waits for an agent that is restarted, which takes moments.
async fn reattach(
    client: &Client,
    id: Uuid,
    view: &View,
    cause: Option<anyhow::Error>,
) -> anyhow::Result<Lines> {
    view.say("the agent has gone; waiting for it to come back");
    let since = Instant::now();
    loop {
        tokio::time::sleep(REATTACH_EVERY).await;
        match client.lines(&format!("{}/events", migration_path(id))).await {
            Ok(lines) => return Ok(lines),
            Err(e) if since.elapsed() > REATTACH_WITHIN => {
                let settled = format!(
                    "the agent is gone; the migration goes on or is settled when it is back: `vmferry watch {id}`"
                );
                return Err(cause.unwrap_or(e).context(settled));
            }
            Err(_) => {}
        }
    }
}

/// The first Ctrl-C asks, a second one soon after it confirms.
#[derive(Default)]
struct Interrupts(Option<Instant>);

impl Interrupts {
    fn confirmed(&mut self) -> bool {
        let soon = self.0.is_some_and(|first| first.elapsed() < Duration::from_secs(10));
        self.0 = Some(Instant::now());
        soon
    }
}

enum View {
    Json,
    Plain { shown: Option<(Phase, bool, String)>, at: Instant },
    Bars { all: MultiProgress, head: ProgressBar, bars: BTreeMap<String, ProgressBar> },
}

impl View {
    fn new(json: bool) -> Self {
        use std::io::IsTerminal;
        if json {
            return Self::Json;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Plain { shown: None, at: Instant::now() };
        }
        let all = MultiProgress::new();
        let head = all.add(ProgressBar::new_spinner());
        head.enable_steady_tick(Duration::from_millis(120));
        Self::Bars { all, head, bars: BTreeMap::new() }
    }

    fn show(&mut self, progress: &Migration) -> anyhow::Result<()> {
        match self {
            Self::Json => println!("{}", serde_json::to_string(progress)?),
            Self::Plain { shown, at } => {
                let now = Some((progress.phase, reconnecting(progress).is_some(), which_try(progress)));
                if *shown != now || at.elapsed() > PLAIN_EVERY {
                    (*shown, *at) = (now, Instant::now());
                    eprintln!("{}", plain(progress));
                }
            }
            Self::Bars { all, head, bars } => draw(all, head, bars, progress),
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        match self {
            Self::Bars { all, .. } => drop(all.println(text)),
            _ => eprintln!("{text}"),
        }
    }

    fn end(&mut self) {
        if let Self::Bars { all, .. } = self {
            let _ = all.clear();
        }
    }
}

/// The one thing that matters while it lasts.
fn reconnecting(progress: &Migration) -> Option<String> {
    let Some(missing) = progress.reconnecting.as_ref() else { return progress.slow.clone() };
    Some(format!("reconnecting, {} s of {} ({})", missing.for_s, missing.of_s, missing.cause))
}

/// Which try it is, where there may be several.
fn which_try(progress: &Migration) -> String {
    progress.tries.as_ref().map_or_else(String::new, |t| format!(", try {} of {}", t.number, t.of))
}

/// The wait for the next try, while there is one.
fn waiting(progress: &Migration) -> Option<String> {
    let next_in_ms = progress.tries.as_ref()?.next_in_ms?;
    let last = progress.tries.as_ref()?.last_failure.as_deref().unwrap_or_default();
    let head = format!("{}{}", show::way(progress), which_try(progress));
    Some(format!("{head}, next in {} s: {last}", next_in_ms.div_ceil(1000)))
}

fn plain(progress: &Migration) -> String {
    if let Some(waiting) = waiting(progress) {
        return waiting;
    }
    if let Some(words) = reconnecting(progress) {
        return format!("{}: {}, {words}", show::way(progress), progress.phase.name());
    }
    let (done, total) = totals(progress);
    format!(
        "{}{}: {} {} of {}, {}/s",
        show::way(progress),
        which_try(progress),
        progress.phase.name(),
        HumanBytes(done),
        HumanBytes(total),
        HumanBytes(progress.rate_bytes_per_s),
    )
}

fn totals(progress: &Migration) -> (u64, u64) {
    let ram = progress.ram.as_ref().map_or((0, 0), ram_done);
    progress.disks.iter().fold(ram, |(done, total), d| (done + d.done_bytes, total + d.total_bytes))
}

fn ram_done(ram: &Ram) -> (u64, u64) {
    (ram.total_bytes.saturating_sub(ram.remaining_bytes), ram.total_bytes)
}

fn draw(
    all: &MultiProgress,
    head: &ProgressBar,
    bars: &mut BTreeMap<String, ProgressBar>,
    progress: &Migration,
) {
    if let Some(waiting) = waiting(progress) {
        return head.set_message(waiting);
    }
    let eta = eta(progress).map(|t| format!(", about {} left", HumanDuration(t))).unwrap_or_default();
    let pace =
        reconnecting(progress).unwrap_or_else(|| format!("{}/s{eta}", HumanBytes(progress.rate_bytes_per_s)));
    head.set_message(format!(
        "{}{}: {}, {pace}",
        show::way(progress),
        which_try(progress),
        progress.phase.name()
    ));
    for disk in &progress.disks {
        let state = if disk.ready { "in step" } else { "" };
        bar(all, bars, &format!("disk {}", disk.name), disk.done_bytes, disk.total_bytes, state);
    }
    if let Some(ram) = &progress.ram {
        let (done, total) = ram_done(ram);
        bar(all, bars, "RAM", done, total, &format!("pass {}", ram.passes));
    }
}

fn bar(
    all: &MultiProgress,
    bars: &mut BTreeMap<String, ProgressBar>,
    name: &str,
    done: u64,
    total: u64,
    state: &str,
) {
    let bar = bars.entry(name.to_owned()).or_insert_with(|| {
        let style = "  {prefix:14} {bar:30} {bytes:>11} of {total_bytes:11} {msg}";
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        all.add(ProgressBar::new(total)).with_style(style).with_prefix(name.to_owned())
    });
    bar.set_length(total);
    bar.set_position(done);
    bar.set_message(state.to_owned());
}

fn eta(progress: &Migration) -> Option<Duration> {
    let (done, total) = totals(progress);
    let copying = matches!(progress.phase, Phase::Mirror | Phase::Precopy);
    let seconds = total.saturating_sub(done).checked_div(progress.rate_bytes_per_s)?;
    (copying && seconds > 0).then(|| Duration::from_secs(seconds))
}
