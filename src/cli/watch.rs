//! Following a migration: bars on a terminal, plain lines elsewhere, JSON on request.
//!
//! Ctrl-C asks once and then cancels cleanly. Whatever happens to this process, the migration
//! goes on: it belongs to the agent.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use uuid::Uuid;

use super::client::{Client, Lines};
use super::exit_code::{self, EXIT_USAGE};
use super::progress::{self, Bar, Rates};
use super::show;
use crate::api::{Migration, Phase, migration_path};

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
    Bars(Bars),
}

/// A terminal: the whole in the first line, a bar for it, and one for each disk and the RAM.
struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    bars: BTreeMap<String, ProgressBar>,
    rates: Rates,
}

impl View {
    fn new(json: bool) -> Self {
        use std::io::IsTerminal;
        if json {
            Self::Json
        } else if std::io::stderr().is_terminal() {
            Self::Bars(Bars::new())
        } else {
            Self::Plain { shown: None, at: Instant::now() }
        }
    }

    fn show(&mut self, migration: &Migration) -> anyhow::Result<()> {
        match self {
            Self::Json => show::json_line(migration, migration.outcome.is_some())?,
            Self::Plain { shown, at } => {
                let hindered = progress::hindrance(migration).is_some();
                let now = Some((migration.phase, hindered, progress::which_try(migration)));
                if *shown != now || at.elapsed() > PLAIN_EVERY {
                    (*shown, *at) = (now, Instant::now());
                    eprintln!("{}", progress::line(migration));
                }
            }
            Self::Bars(bars) => bars.draw(migration),
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        match self {
            Self::Bars(bars) => drop(bars.all.println(text)),
            _ => eprintln!("{text}"),
        }
    }

    fn end(&mut self) {
        if let Self::Bars(bars) = self {
            let _ = bars.all.clear();
        }
    }
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let head = all.add(ProgressBar::new_spinner());
        head.enable_steady_tick(Duration::from_millis(120));
        Self { all, head, bars: BTreeMap::new(), rates: Rates::default() }
    }

    fn draw(&mut self, migration: &Migration) {
        if let Some(waiting) = progress::waiting(migration) {
            return self.head.set_message(waiting);
        }
        let way = format!("{}{}", progress::way(migration), progress::which_try(migration));
        let words = progress::phase_words(migration);
        self.head.set_message(format!("{way}: {words}, {}", progress::pace(migration)));
        if let Some(whole) = &migration.whole {
            let bar = self.bar("all of it", "  {prefix:14} {bar:30} {msg}");
            bar.set_length(1000);
            bar.set_position(whole.permille.into());
            bar.set_message(format!("{}.{} %", whole.permille / 10, whole.permille % 10));
        }
        for Bar { name, done_bytes, total_bytes, text } in self.rates.bars(migration, Instant::now()) {
            let bar = self.bar(&name, "  {prefix:14} {bar:30} {bytes:>11} of {total_bytes:11} {msg}");
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
            bar.set_message(text);
        }
    }

    fn bar(&mut self, name: &str, style: &str) -> &ProgressBar {
        self.bars.entry(name.to_owned()).or_insert_with(|| {
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.all.add(ProgressBar::new(1)).with_style(style).with_prefix(name.to_owned())
        })
    }
}
