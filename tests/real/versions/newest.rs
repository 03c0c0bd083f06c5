//! The other ways of moving disks, with QEMU 11 on both hosts: docs/disks.md has them in its table.

use anyhow::Result;

use crate::disks::{
    adapted, after_failures, arm, firmware, in_band, incremental, left_out, moved, outrun, read_only,
    replica, template, thin, verify, volumes,
};
use crate::support::{Lab, Version, with_lab};

const NEWEST: Version = Version::V11;

macro_rules! on_qemu_11 {
    ($($name:ident: $test:expr;)*) => {$(
        #[test]
        #[ignore = "make versions"]
        fn $name() -> Result<()> {
            let test: fn(&str) -> Result<()> = $test;
            test(stringify!($name))
        }
    )*};
}

fn bed(name: &str, test: fn(&Lab, Version) -> Result<()>) -> Result<()> {
    with_lab(name, |lab| test(lab, NEWEST))
}

on_qemu_11! {
    disks_of_each_kind_arrive_in_their_places: |name| bed(name, moved::each_kind_arrives_in_its_place);
    a_move_from_a_replica_sends_what_changed: |name| bed(name, replica::only_what_changed_is_sent);
    only_the_topmost_images_are_copied: |name| bed(name, incremental::only_tops_are_copied);
    nothing_in_a_base_is_not_read: |name| incremental::holes_are_not_read(name, NEWEST);
    a_terabyte_of_nothing_is_moved: |name| thin::of_nothing(name, NEWEST);
    a_comparison_is_cancelled_and_taken_over: |name| verify::is_interrupted(NEWEST, name);
    a_base_that_differs_in_one_bit_stops_it: |name| bed(name, incremental::what_differs_is_not_copied);
    media_that_differ_stop_it: |name| bed(name, read_only::media_are_compared);
    disks_are_begun_in_order: |name| left_out::begin_in_order(name, NEWEST);
    a_replica_that_may_not_fit_is_copied_whole: |name| replica::is_copied_whole_or_goes_on(name, NEWEST);
    an_agent_is_replaced_in_the_middle_of_a_run: |name| replica::goes_on_with_other_agents(name, NEWEST);
    a_guest_that_writes_moves_from_its_replica: |name| replica::counts_on(name, NEWEST);
    images_go_after_a_choice_of_failures: |name| after_failures::a_choice(name, NEWEST);
    an_arm_guest_arrives_with_its_disk_and_its_flash: |name| arm::arrives(name, NEWEST);
    disks_do_not_go_in_band: |name| in_band::is_refused_on_qemu_11(name);
    a_guest_that_outruns_the_copy_of_its_changes_is_slowed: |name| outrun::ends_when_changes_are_slowed(NEWEST, name);
    what_is_shared_stays_where_it_is: |name| bed(name, left_out::what_is_shared_stays_where_it_is);
    what_commands_make_is_used_and_removed: |name| bed(name, volumes::on);
    a_qemu_of_the_sources_own_words_takes_the_guest: |name| adapted::takes_the_guest(name, NEWEST);
    a_guest_comes_by_a_pattern: |name| template::on(NEWEST, name);
    firmware_variables_and_a_tpm_arrive: |name| firmware::arrive(NEWEST, name);
    a_guest_that_outruns_its_copy_is_slowed: |name| outrun::ends_when_it_is_slowed(NEWEST, "write-blocking", name);
}
