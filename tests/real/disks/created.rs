//! Images that the destination's agent makes: the guest moves onto them, and after each failure they are gone.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};

use crate::faults::{Case, End, Fault, Plan, Reach, Stage, Who, play_all};
use crate::support::with_lab;

#[test]
fn images_that_are_made_go_when_the_guest_does_not_come() -> Result<()> {
    with_lab("images_that_are_made_go_when_the_guest_does_not_come", |lab| {
        // Bravo may ask alpha what became of a guest.
        let plan = Plan { created: 2, both_ways: true, ..Plan::ORDINARY };
        let mut stage = Stage::set_up(lab, plan)?;
        let checked = stage.alpha.vmferry(&["check", "web1", "--to", "bravo"])?;
        ensure!(checked.code == 0, "{checked:?}");
        stage.has_no_made_image().context("after a check")?;
        let gone = End::failed(&["precopy"], &["destination", "QEMU", "web1|gone"]);
        let restarted = End::failed(&["mirror"], &["agent", "restarted"]);
        play_all(
            &mut stage,
            &[
                Case::new(Fault::Kill(Who::SourceAgent), Reach::Mirror, restarted),
                Case::new(Fault::Kill(Who::DestinationQemu), Reach::Precopy, gone),
                Case::new(Fault::Cancel, Reach::Device, End::cancelled(&["device"])),
            ],
        )?;
        stage.moves()?;
        // Thin is what was thin, also when the guest has written on there for a while.
        let (there, here) = (fs::metadata(stage.destination.disk(0))?, fs::metadata(stage.source.disk(0))?);
        let holes = |file: &fs::Metadata| file.len().saturating_sub(file.blocks() * 512);
        let (there, here) = (holes(&there), holes(&here));
        ensure!(
            here > 0 && there * 2 >= here,
            "{there} bytes of holes at the destination, {here} at the source"
        );
        let outcome = stage.bravo.vmferry(&["recover"])?;
        ensure!(outcome.code == 0 && stage.destination.disk(0).exists(), "{outcome:?}");
        Ok(())
    })
}
