//! The session protocol against a model: what is sent arrives, in order, once, whatever the link
//! and the users do; limits hold at every step; nothing is left at the end. Then the scheduler's
//! promises, every cut of a short transcript, and the bytes of version 1.

use super::rng::number_from_env;
use super::world::World;

const STEPS_DEFAULT: u64 = 1_000_000;
const STEPS_PER_WORLD: u64 = 3_000;

/// `VMFERRY_SEED` repeats one world, `VMFERRY_MODEL_STEPS` sets how much is tried.
#[test]
fn whatever_happens_every_stream_delivers_its_bytes() {
    if let Some(seed) = number_from_env("VMFERRY_SEED") {
        World::new(seed).run(STEPS_PER_WORLD);
        return;
    }
    let steps = number_from_env("VMFERRY_MODEL_STEPS").unwrap_or(STEPS_DEFAULT);
    let (mut moved, mut cuts, mut successions, mut replayed) = (0, 0, 0, 0);
    for seed in 0..steps.div_ceil(STEPS_PER_WORLD) {
        let mut world = World::new(seed);
        world.run(STEPS_PER_WORLD);
        moved += world.moved_bytes;
        cuts += world.cuts;
        successions += world.successions;
        replayed += world.replayed_bytes;
    }
    println!("{moved} bytes delivered, {cuts} cuts, {successions} successions, {replayed} bytes replayed");
    // The worlds must be worth something.
    assert!(moved > steps * 100, "only {moved} bytes were delivered");
    assert!(successions > steps / 20_000, "only {successions} successions");
    assert!(cuts > steps / 10_000 && replayed > steps, "only {cuts} cuts, {replayed} bytes replayed");
}
