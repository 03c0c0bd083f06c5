//! The text of this program's half of `RESULTS.md`.

use std::fmt::Write;

use crate::machine;

/// One table and what it says.
pub(crate) struct Section {
    pub(crate) title: String,
    /// What was done, and what is asked of vmferry.
    pub(crate) what: String,
    /// Arguments that repeat it.
    pub(crate) again: String,
    pub(crate) table: String,
}

/// The results so far.
pub(crate) struct Report {
    text: String,
}

impl Report {
    /// Begins with what it is measured on.
    pub(crate) fn begin(machine: &str) -> Self {
        let text = format!(
            "# Real migrations\n\n\
             Written by `bench/run.sh --moves` (`make bench`).\n\n{machine}\n\n\
             Two hosts are two network namespaces of this machine, joined by a veth pair; QEMU 10.0 on \
             both, and one agent on each. Everything shares the same cores: two QEMUs, two agents and \
             both ends of TCP. Images and file-backed RAM lie on a tmpfs, the agents' journals on the \
             machine's disk. Contenders take turns within a round; ratios are taken within a round; shown \
             is the median over the rounds and [least–greatest]. Times are between events of QEMU's \
             monitor, by the time that QEMU puts on them, and mean the same for all contenders.\n"
        );
        Self { text }
    }

    /// A section with its figures.
    pub(crate) fn section(&mut self, section: &Section) {
        let Section { title, what, again, table } = section;
        // Writing to a String can't fail.
        let _ = write!(
            self.text,
            "\n## {title}\n\n{what}\n\nAgain: `bench/run.sh --moves {again}`. Load average afterwards: {}.\n\n{table}",
            machine::load(),
        );
    }

    /// A section without figures.
    pub(crate) fn failed(&mut self, title: &str, why: &str) {
        let _ = write!(self.text, "\n## {title}\n\n**Not measured**: {why}.\n");
    }

    /// The whole.
    pub(crate) fn end(self) -> String {
        self.text
    }
}
