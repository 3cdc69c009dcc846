//! Disks that are full or can't be written, networks that were renamed, agents that do not answer: what
//! is said, and that nothing is lost. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test fails by panicking, and its names are sentences"
)]

mod bed;

use std::{
    collections::HashSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use bed::{Bed, Mood, Said, key, sh};
use penstock_cni::{
    agent::{Answer, Request},
    state::State,
};
use serde_json::{Value, json};

/// The state's folder on a disk of its own, until this is dropped.
struct Disk(PathBuf);

impl Disk {
    fn of(bed: &Bed) -> Self {
        let folder = bed.state_dir();
        fs::create_dir_all(&folder).unwrap();
        let path = folder.to_str().unwrap();
        sh("mount", &["-t", "tmpfs", "-o", "size=64k", "tmpfs", path]);
        Self(folder)
    }

    /// Takes all room that there is.
    fn fill(&self) {
        let filler = self.filler();
        let mut filler = fs::File::options()
            .create(true)
            .append(true)
            .open(filler)
            .unwrap();
        while filler.write_all(&[0; 512]).is_ok() {}
    }

    fn clear(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn remount(&self, option: &str) {
        let option = format!("remount,{option}");
        sh("mount", &["-o", &option, self.0.to_str().unwrap()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn gc(bed: &Bed, valid: &Value) -> Said {
    bed.run(
        &bed.call("GC", "")
            .with("cni.dev/valid-attachments", valid.clone()),
    )
}

#[test]
fn a_full_disk_refuses_pods_and_lets_them_go() {
    let Some(mut bed) = Bed::new() else { return };
    let ids = ["a", "b", "c", "d", "e", "f"];
    for id in ids {
        bed.container(id);
    }
    let disk = Disk::of(&bed);
    for id in &ids[..5] {
        bed.add(id).success();
    }
    disk.fill();
    let before = fs::read(bed.state_path()).unwrap();
    bed.add("f").fails(5, "pods.json");
    assert_eq!(fs::read(bed.state_path()).unwrap(), before);
    assert_eq!(bed.links().len(), 5);
    // One after the other, while others take whatever room that gives back.
    for (done, id) in ids[..3].iter().enumerate() {
        bed.del(id).success();
        bed.del(id).success();
        assert_eq!(bed.state().attachments.len(), 4 - done);
        assert_eq!(bed.links().len(), 4 - done);
        disk.fill();
    }
    let valid = json!([{"containerID": "e", "ifname": "eth0"}]);
    gc(&bed, &valid).success();
    assert_eq!(bed.state().attachments.len(), 1);
    assert_eq!(bed.state().released.len(), 8);
    disk.clear();
    bed.add("f").success();
    bed.del("e").success();
    bed.del("f").success();
    bed.assert_clean();
}

#[test]
fn without_room_for_its_end_no_attachment_begins() {
    let Some(mut bed) = Bed::new() else { return };
    for id in ["a", "b"] {
        bed.container(id);
    }
    let disk = Disk::of(&bed);
    bed.add("a").success();
    // There is room for the state alone, which is less than a page.
    fs::remove_file(bed.state_dir().join("pods.reserve")).unwrap();
    disk.fill();
    let file = fs::File::options().write(true).open(disk.filler()).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 4_096).unwrap();
    bed.add("b").fails(5, "pods.json");
    assert_eq!(bed.state().attachments.len(), 1);
    bed.del("a").success();
    disk.clear();
    bed.assert_clean();
}

#[test]
fn what_a_killed_call_did_not_finish_on_a_full_disk_another_does() {
    let Some(mut bed) = Bed::new() else { return };
    bed.container("a");
    let disk = Disk::of(&bed);
    bed.add("a").success();
    let [reserve, new] = ["pods.reserve", "pods.new"].map(|name| bed.state_dir().join(name));
    // It was about to write where the reserve had been.
    fs::rename(&reserve, &new).unwrap();
    disk.fill();
    bed.del("a").success();
    disk.clear();
    bed.assert_clean();
}

#[test]
fn a_disk_that_is_not_written_keeps_addresses_and_no_links() {
    let Some(mut bed) = Bed::new() else { return };
    for id in ["a", "b", "c"] {
        bed.container(id);
    }
    let disk = Disk::of(&bed);
    let results = ["a", "b"].map(|id| bed.add(id).success());
    disk.remount("ro");
    bed.add("c").fails(5, "Read-only");
    bed.check("a", &results[0]).success();
    bed.del("a").fails(5, "Read-only");
    assert_eq!(bed.links().len(), 1);
    assert_eq!(bed.state().attachments.len(), 2);
    // What is gone already needs no writing.
    bed.del("c").success();
    bed.run(&bed.call("DEL", "c").with("name", json!("other")))
        .success();
    gc(&bed, &json!([])).fails(5, "Read-only");
    assert_eq!(bed.links(), Vec::<String>::new());
    disk.remount("rw");
    bed.del("a").success();
    gc(&bed, &json!([])).success();
    assert_eq!(bed.state().released.len(), 4);
    bed.assert_clean();
}

#[test]
fn a_network_that_was_renamed_gives_back_what_it_gave() {
    let Some(mut bed) = Bed::new() else { return };
    for id in ["a", "b", "c"] {
        bed.container(id);
    }
    let renamed =
        |bed: &Bed, command: &str, id: &str| bed.call(command, id).with("name", json!("new"));
    let ips = |result: &Value| -> Vec<String> {
        let ips = result["ips"].as_array().unwrap().iter();
        ips.map(|ip| ip["address"].as_str().unwrap().to_owned())
            .collect()
    };
    let result = bed.add("a").success();
    let second = bed.add("b").success();
    // Addresses are the node's, whatever the network is called.
    let third = bed.run(&renamed(&bed, "ADD", "c")).success();
    let all: HashSet<String> = [&result, &second, &third]
        .into_iter()
        .flat_map(ips)
        .collect();
    assert_eq!(all.len(), 6);
    let check = renamed(&bed, "CHECK", "a").with("prevResult", result.clone());
    bed.run(&check).success();
    let heard = bed.agent().heard();
    let asked = heard.last().unwrap();
    let expected = Request::Check {
        network: "pods".to_owned(),
        attachment: key("a"),
    };
    assert_eq!(asked, &expected);
    // A runtime that calls by the new name, one that kept the old one, and one that repeats itself.
    bed.run(&renamed(&bed, "DEL", "a")).success();
    assert_eq!(bed.state().attachments.len(), 1);
    bed.del("b").success();
    bed.run(&renamed(&bed, "DEL", "b")).success();
    assert!(bed.state().attachments.is_empty());
    assert_eq!(bed.state().released.len(), 4);
    // What was given back by the old name rests under the new one too.
    let ask = renamed(&bed, "ADD", "a").variable("CNI_ARGS", "IP=10.244.7.2");
    bed.run(&ask).fails(11, "given back less than");
    bed.run(&renamed(&bed, "DEL", "c")).success();
    let state = State::read(&State::path(&bed.state_dir(), "new")).unwrap();
    assert_eq!(state.unwrap().attachments, []);
    assert_eq!(bed.links(), Vec::<String>::new());
    // A container that moves from one to the other has addresses of one.
    bed.add("b").success();
    let moved = bed.run(&renamed(&bed, "ADD", "b")).success();
    bed.run(&renamed(&bed, "CHECK", "b").with("prevResult", moved))
        .success();
    assert!(bed.state().attachments.is_empty());
    assert_eq!(bed.links().len(), 1);
    // One file that can't be read says nothing about the others, but whose its addresses are.
    fs::write(bed.state_path(), "{").unwrap();
    bed.run(&renamed(&bed, "ADD", "c")).fails(6, "pods.json");
    bed.run(&renamed(&bed, "DEL", "b")).success();
    assert_eq!(bed.links(), Vec::<String>::new());
}

#[test]
fn check_asks_the_agent() {
    let Some(mut bed) = Bed::new() else { return };
    bed.container("a");
    let result = bed.add("a").success();
    let says = |text: &str| text.to_owned();
    for (mood, code, words) in [
        (
            Mood::Says(Answer::Failed(says("ENDPOINTS has nothing"))),
            102,
            "ENDPOINTS has nothing",
        ),
        (
            Mood::Says(Answer::NotYet(says("loading maps"))),
            11,
            "loading maps",
        ),
        (Mood::HangsUp, 11, "closed without an answer"),
    ] {
        bed.agent().set(mood);
        bed.check("a", &result).fails(code, words);
    }
    bed.agent = None;
    bed.check("a", &result).fails(11, "agent.sock");
    // What is seen without it is a mismatch all the same.
    sh("ip", &["-n", &bed.node(), "link", "del", &bed.links()[0]]);
    bed.check("a", &result).fails(102, "is gone");
}

#[test]
fn a_container_that_is_gone_needs_no_del_unless_it_has_addresses() {
    let Some(mut bed) = Bed::new() else { return };
    let namespace = bed.container("a");
    bed.add("a").success();
    bed.end(&namespace);
    bed.add("a").fails(4, "DEL gives them back");
    bed.del("a").success();
    bed.add("a").fails(3, "is gone");
    assert!(!Path::new("/run/netns").join(&namespace).exists());
    bed.assert_clean();
}
