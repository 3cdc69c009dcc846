//! An agent that is only a socket.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use penstock_cni::{
    agent::{Answer, Request, SOCKET},
    state::State,
};

/// How it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    /// That it is done, if the state and the node have what is to be wired.
    Honest,
    /// This.
    Says(Answer),
    /// These octets.
    Babbles(&'static str),
    /// Not at all: it closes.
    HangsUp,
    /// Not at all: it does nothing until the other closes.
    IsSilent,
}

/// The agent, until it is dropped.
pub struct Agent {
    path: PathBuf,
    mood: Arc<Mutex<Mood>>,
    heard: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    pub fn start(run_dir: &Path, state_dir: &Path) -> Self {
        let path = run_dir.join(SOCKET);
        let listener = UnixListener::bind(&path).unwrap();
        let mood = Arc::new(Mutex::new(Mood::Honest));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (its_mood, its_heard) = (mood.clone(), heard.clone());
        let state_dir = state_dir.to_owned();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A caller may have been killed; an empty line is the end.
                if !serve(stream.unwrap(), &its_mood, &its_heard, &state_dir) {
                    return;
                }
            }
        });
        Self {
            path,
            mood,
            heard,
            thread: Some(thread),
        }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// What it was asked.
    pub fn heard(&self) -> Vec<Request> {
        self.heard.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: UnixStream,
    mood: &Mutex<Mood>,
    heard: &Mutex<Vec<Request>>,
    state_dir: &Path,
) -> bool {
    let mut line = String::new();
    if BufReader::new(&stream).read_line(&mut line).is_err() || line.is_empty() {
        return true;
    }
    let Ok(request) = serde_json::from_str::<Request>(&line) else {
        return line.trim() != "end";
    };
    heard.lock().unwrap().push(request.clone());
    let answer = match mood.lock().unwrap().clone() {
        Mood::Honest => honest(&request, state_dir),
        Mood::Says(answer) => answer,
        Mood::Babbles(text) => {
            let _ = stream.write_all(text.as_bytes());
            return true;
        }
        Mood::HangsUp => return true,
        Mood::IsSilent => {
            let _ = stream.read(&mut [0]);
            return true;
        }
    };
    let mut text = serde_json::to_vec(&answer).unwrap();
    text.push(b'\n');
    let _ = stream.write_all(&text);
    true
}

/// What the real one needs for wiring has to be there when it is asked.
fn honest(request: &Request, state_dir: &Path) -> Answer {
    let Request::Wire {
        network,
        attachment,
        ..
    } = request
    else {
        return Answer::Done;
    };
    let state = State::read(&State::path(state_dir, network))
        .unwrap()
        .unwrap();
    match state.attachment(attachment) {
        Some(_) => Answer::Done,
        None => Answer::Failed("the state does not name it".to_owned()),
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(mut stream) = UnixStream::connect(&self.path) {
            let _ = stream.write_all(b"end\n");
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
