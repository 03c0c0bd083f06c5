//! `vmferry qemu-command`: how a VM's QEMU is started on another host, as a script or a unit to be put there.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use hyper::Method;

use super::client::Client;
use super::{complete, show};
use crate::api::{OtherPath, QemuCommand, QemuCommandRequest};

#[derive(Debug, Args)]
pub(super) struct QemuCommandArgs {
    /// The VM, which runs on this host.
    #[arg(value_name = "VM", add = complete::vms())]
    vm: String,
    /// Print a shell script or a systemd unit.
    #[arg(long, value_enum, default_value_t = Form::Script)]
    form: Form,
    /// Where a disk's image is on the other host, as `path` of its [create]: {vm}, {disk}, {format} are their names.
    #[arg(long, value_name = "PATTERN")]
    images: Option<String>,
    /// Another path there, or what paths begin with; may be repeated.
    #[arg(long = "path", value_name = "HERE=THERE", value_parser = other_path)]
    paths: Vec<OtherPath>,
    /// QEMU's program there.
    #[arg(long, value_name = "PATH")]
    program: Option<String>,
    /// Print JSON.
    #[arg(long, conflicts_with = "form")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Script,
    Unit,
}

fn other_path(text: &str) -> Result<OtherPath, String> {
    match text.split_once('=') {
        Some((from, to)) if from.starts_with('/') && to.starts_with('/') => {
            Ok(OtherPath { from: from.to_owned(), to: to.to_owned() })
        }
        _ => Err("write two absolute paths, as in /srv/a=/srv/b".into()),
    }
}

pub(super) async fn run(client: &Client, args: QemuCommandArgs) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/vms/{}/qemu-command", args.vm);
    let request = QemuCommandRequest { program: args.program, images: args.images, paths: args.paths };
    let made: QemuCommand = client.call(Method::POST, &path, &request).await?;
    match args.form {
        _ if args.json => show::json(&made)?,
        Form::Script => print!("{}", script(&made)),
        Form::Unit => print!("{}", unit(&made)),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be known before it is used. No word of QEMU's ends a line of it.
fn comment(made: &QemuCommand) -> String {
    let mut text = format!(
        "# A QEMU that waits for VM {}, made from the command line of process {} by `vmferry qemu-command`.\n\
         # Read it before it is used; `vmferry check` says what is still different.\n",
        made.vm, made.pid
    );
    let lists = [
        ("To be decided by you:", &made.undecided),
        ("Not as it was:", &made.changed),
        ("Paths that it needs here, besides what it makes itself:", &made.paths),
    ];
    for (title, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
        text.push_str(&format!("#\n# {title}\n"));
        list.iter().for_each(|line| text.push_str(&format!("#   {}\n", line.replace(char::is_control, " "))));
    }
    text
}

fn script(made: &QemuCommand) -> String {
    format!("#!/bin/sh\n{}exec {}\n", comment(made), lines(made, for_shell))
}

fn unit(made: &QemuCommand) -> String {
    format!(
        "{}[Unit]\nDescription=Virtual machine {}, moved here\n\n[Service]\nType=exec\nRestart=no\nExecStart={}\n",
        comment(made),
        made.vm,
        lines(made, for_systemd)
    )
}

/// An option and its value on each line.
fn lines(made: &QemuCommand, quoted: fn(&str) -> String) -> String {
    let mut text = String::new();
    for (at, word) in made.words.iter().enumerate() {
        let separator = match at {
            0 => "",
            _ if word.starts_with('-') => " \\\n  ",
            _ => " ",
        };
        text.push_str(separator);
        text.push_str(&quoted(word));
    }
    text
}

fn is_plain(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.,=/:@+".contains(c))
}

fn for_shell(word: &str) -> String {
    if is_plain(word) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// systemd.service(5), "Command lines"; nothing is expanded in it.
fn for_systemd(word: &str) -> String {
    if is_plain(word) {
        return word.to_owned();
    }
    let escaped = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        '$' => "$$".to_owned(),
        '%' => "%%".to_owned(),
        '\n' => "\\n".to_owned(),
        '\t' => "\\t".to_owned(),
        c => c.to_string(),
    };
    format!("\"{}\"", word.chars().map(escaped).collect::<String>())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    fn made(words: &[&str]) -> QemuCommand {
        QemuCommand {
            vm: "web1".into(),
            pid: 7,
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            changed: vec!["a\nrm -rf /".into()],
            undecided: Vec::new(),
            paths: Vec::new(),
        }
    }

    #[test]
    fn a_script_has_exactly_the_words_and_no_comment_becomes_a_command() {
        let words =
            ["printf", "%s|", "", "it's", "a b", "$HOME", "-x", "\\", "{\"a\": 1}", "two\nlines", "`id`"];
        let script = script(&made(&words));
        let said = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(said.status.success(), "{said:?} of {script}");
        assert_eq!(
            String::from_utf8(said.stdout).unwrap(),
            words[2..].iter().map(|w| format!("{w}|")).collect::<String>()
        );
    }

    #[test]
    fn a_unit_has_the_words_as_systemd_reads_them() {
        let unit = unit(&made(&["/usr/bin/qemu", "-append", "a \"b\" $c %d \\", "-S"]));
        let expected = "ExecStart=/usr/bin/qemu \\\n  -append \"a \\\"b\\\" $$c %%d \\\\\" \\\n  -S\n";
        assert!(unit.ends_with(expected), "{unit}");
    }

    #[test]
    fn another_path_is_two_absolute_ones() {
        assert_eq!(other_path("/a=/b").unwrap(), OtherPath { from: "/a".into(), to: "/b".into() });
        assert!(["/a", "a=/b", "/a=b", ""].into_iter().all(|text| other_path(text).is_err()));
    }
}
