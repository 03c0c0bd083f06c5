//! Manual pages and completions, made of the arguments themselves. What no argument says is here: exit codes, files
//! and the environment.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::args::Arguments;
use super::client::{SOCKET, SOCKET_VARIABLE};
use super::complete;
use super::exit_code::{EXIT_FAILED, EXIT_LEFT, EXIT_UNDECIDED, EXIT_USAGE};
use crate::config::DEFAULT_PATH;

const PROGRAM: &str = "vmferry";

/// Where each shell looks for the completions of packages, below the folder of a package's shared files.
const SHELLS: [(&dyn EnvCompleter, &str); 3] = [
    (&Bash, "bash-completion/completions/vmferry"),
    (&Zsh, "zsh/vendor-completions/_vmferry"),
    (&Fish, "fish/vendor_completions.d/vmferry.fish"),
];

/// zsh reads the file when it is asked the first time, and is answered only if the file does so.
const ZSH_FIRST: &[u8] =
    b"\nif [ \"$funcstack[1]\" = \"_vmferry\" ]; then _clap_dynamic_completer_vmferry \"$@\"; fi\n";

/// Writes everything below `folder`/share.
pub(super) fn write(folder: &Path) -> anyhow::Result<()> {
    let share = folder.join("share");
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    pages(&command, &share.join("man/man1"))?;
    for (shell, path) in SHELLS {
        let mut script = Vec::new();
        shell.write_registration(complete::VARIABLE, PROGRAM, PROGRAM, PROGRAM, &mut script)?;
        if shell.is("zsh") {
            script.extend_from_slice(ZSH_FIRST);
        }
        write_file(&share.join(path), &script)?;
    }
    Ok(())
}

/// The page of a command, and those of the commands below it.
fn pages(command: &Command, folder: &Path) -> anyhow::Result<()> {
    let man = Man::new(command.clone()).source(format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(more) = command.get_after_help() {
        as_it_stands(&more.to_string()).to_writer(&mut page)?;
    }
    let is_whole = command.get_name() == PROGRAM;
    let more = if is_whole { whole_program() } else { sections(&[("SEE ALSO", &[("vmferry(1)", "")])]) };
    more.to_writer(&mut page)?;
    write_file(&folder.join(man.get_filename()), &page)?;
    let below = command.get_subcommands().filter(|c| !c.is_hide_set());
    below.into_iter().try_for_each(|below| pages(below, folder))
}

/// A table in words, whose lines stay lines.
fn as_it_stands(text: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["MORE"]);
    roff.control("nf", []);
    for line in text.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff
}

fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let written = || {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        fs::File::create(path)?.write_all(bytes)
    };
    written().with_context(|| path.display().to_string())
}

fn whole_program() -> Roff {
    let [failed, usage, left, undecided] =
        [EXIT_FAILED, EXIT_USAGE, EXIT_LEFT, EXIT_UNDECIDED].map(|code| code.to_string());
    sections(&[
        (
            "EXIT STATUS",
            &[
                ("0", "Moved, or done."),
                (
                    &failed,
                    "Failed, and the virtual machine was not moved. Of check: something was found. \
                     Of agent: it could not start, a restart may help. Of recover: the decision was not taken.",
                ),
                (&usage, "Usage, configuration, or the agent cannot be reached."),
                (&left, "Moved, but something is left to clean up, which is said."),
                (
                    &undecided,
                    "Undecided: handed over, and the destination's word is missing. The agent goes on asking. \
                     Of recover: something is undecided, or a journal is not believed.",
                ),
            ],
        ),
        (
            "ENVIRONMENT",
            &[
                (SOCKET_VARIABLE, "The local agent's socket, where --socket does not say so."),
                (
                    "VMFERRY_LOG",
                    "What the agent logs, as RUST_LOG has it: debug, or info,vmferry::net=debug.",
                ),
            ],
        ),
        (
            "FILES",
            &[
                (
                    DEFAULT_PATH,
                    "The agent's configuration. The example beside the program's documents has every key.",
                ),
                ("/etc/vmferry/tls/", "Certificates and the private key of this host."),
                ("/etc/vmferry/vm/NAME.env", "Arguments of QEMU for the example units, qemu@NAME.service."),
                (SOCKET, "The local API."),
                (
                    "/var/lib/vmferry/migrations/",
                    "Journals of migrations. They say whose a virtual machine is; never remove one by hand while `vmferry recover` lists it.",
                ),
                ("/var/lib/vmferry/audit/", "The audit record; see vmferry-audit(1)."),
                (
                    "/usr/share/doc/vmferry/",
                    "More documents: README.md begins with two hosts in five minutes.",
                ),
            ],
        ),
        ("SEE ALSO", &[("systemctl(1), qemu-system-x86_64(1)", "")]),
    ])
}

/// A section's heading, and its words with what they mean.
type Section<'a> = (&'a str, &'a [(&'a str, &'a str)]);

fn sections(all: &[Section<'_>]) -> Roff {
    let mut roff = Roff::new();
    for (heading, entries) in all {
        roff.control("SH", [*heading]);
        for (word, meaning) in *entries {
            if meaning.is_empty() {
                roff.text([roman(*word)]);
                continue;
            }
            roff.control("TP", []);
            roff.text([bold(*word)]);
            roff.text([roman(*meaning)]);
        }
    }
    roff
}
