//! The programs, loaded once more for test runs, and empty ones beside them.

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader, TestRun,
    programs::{Program, SchedClassifier, TestRunOptions, TestRunResult, Xdp},
};
use penstock_agent::dataplane::pins::Pins;
use penstock_common::limits;
use penstock_testbed::Node;

use super::{Subject, crowd};
use crate::load;

/// The programs, loaded once more, over the maps that the agent's use.
pub(super) struct Programs {
    pub(super) ours: Ebpf,
    /// One for each kind of hook, which do nothing.
    empty: Ebpf,
}

/// What a program made of a frame. Not the frame: what the benchmark itself keeps of each would drive flows out of
/// the processor's cache.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) nanos: u64,
    pub(super) verdict: i32,
    pub(super) is_changed: bool,
}

impl Programs {
    pub(super) fn load(node: &Node, flows: usize) -> Result<Self> {
        let mut programs = Self {
            ours: Pins::at(&node.bpffs).load(true, false, limits::FLOWS)?,
            empty: EbpfLoader::new()
                .map_max_entries("RECORDS", flows as u32)
                .load(load::OBJECT)
                .context("loading empty programs")?,
        };
        for name in ["from_pod", "to_pod", "from_uplink"] {
            programs.classifier(name)?.load()?;
        }
        programs.xdp()?.load()?;
        for name in ["pass", "look"] {
            let empty: &mut Xdp = programs.nothing(name)?.try_into()?;
            empty.load()?;
        }
        let empty: &mut SchedClassifier = programs.nothing("nothing")?.try_into()?;
        empty.load()?;
        Ok(programs)
    }

    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program = self.ours.program_mut(name).context("a program")?;
        Ok(program.try_into()?)
    }

    fn xdp(&mut self) -> Result<&mut Xdp> {
        let program = self.ours.program_mut("xdp_uplink").context("a program")?;
        Ok(program.try_into()?)
    }

    fn nothing(&mut self, name: &str) -> Result<&mut Program> {
        self.empty.program_mut(name).context("an empty program")
    }

    /// Has an empty program of the same kind of hook get the frames.
    pub(super) fn run_empty(&mut self, name: &str, frames: &[Vec<u8>]) -> Result<Vec<Run>> {
        if name == "xdp_uplink" {
            let empty: &mut Xdp = self.nothing("pass")?.try_into()?;
            run_all(empty, frames)
        } else {
            let empty: &mut SchedClassifier = self.nothing("nothing")?.try_into()?;
            run_all(empty, frames)
        }
    }

    /// Has a program that looks at one element of an array get the frames, each of another one.
    pub(super) fn look(&mut self, frames: usize) -> Result<Vec<Run>> {
        let look: &mut Xdp = self.nothing("look")?.try_into()?;
        let frames: Vec<_> = (0..frames as u32).map(elements_frame).collect();
        let frames = crowd::scattered(&frames);
        // As known flows' packets do, each turn comes once before it counts.
        run_all(look, &frames)?;
        run_all(look, &frames)
    }

    pub(super) fn run_all(&mut self, name: &str, frames: &[Vec<u8>]) -> Result<Vec<Run>> {
        if name == "xdp_uplink" {
            run_all(self.xdp()?, frames)
        } else {
            run_all(self.classifier(name)?, frames)
        }
    }

    /// Has a subject's program translate flows' first packets; which of them it did, and what came out.
    pub(super) fn translate(
        &mut self,
        subject: &Subject,
        frames: &[Vec<u8>],
    ) -> Result<Vec<(usize, Run, Vec<u8>)>> {
        let mut all = Vec::new();
        let mut index = 0;
        let note = |run: Run, frame: &[u8]| {
            if run.verdict == subject.verdict && run.is_changed {
                all.push((index, run, frame.to_vec()));
            }
            index += 1;
        };
        if subject.request == "xdp_uplink" {
            run_each(self.xdp()?, frames, note)?;
        } else {
            run_each(self.classifier(subject.request)?, frames, note)?;
        }
        Ok(all)
    }
}

/// What says to the program `look` which element of its array to look at.
fn elements_frame(index: u32) -> Vec<u8> {
    let mut frame = vec![0, 0];
    frame.extend(index.to_ne_bytes());
    frame.resize(64, 0);
    frame
}

fn run_all<P>(program: &P, frames: &[Vec<u8>]) -> Result<Vec<Run>>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut runs = Vec::with_capacity(frames.len());
    run_each(program, frames, |run, _| runs.push(run))?;
    Ok(runs)
}

/// Has a program get the frames, and tells of each what came out.
fn run_each<P>(program: &P, frames: &[Vec<u8>], mut tell: impl FnMut(Run, &[u8])) -> Result<()>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = [0; 256];
    for input in frames {
        let result = program.test_run(TestRunOptions {
            data_in: Some(input),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })?;
        let came_out = out.get(..result.data_size_out as usize).unwrap_or(&out);
        let run = Run {
            nanos: result.duration.as_nanos() as u64,
            verdict: result.return_value as i32,
            is_changed: came_out != input.as_slice(),
        };
        tell(run, came_out);
    }
    Ok(())
}
