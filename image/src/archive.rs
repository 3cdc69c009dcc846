//! The archive's two forms over the same files: the index of an OCI layout, and docker's manifest.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{Blob, Image, ImageError, Layer};

const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// Writes images that have the same files to an archive.
pub fn write(path: &Path, layer: &Layer, images: &[Image<'_>]) -> Result<(), ImageError> {
    let failed = |source| ImageError::Pack {
        path: path.display().to_string(),
        source,
    };
    let file = File::create(path).map_err(failed)?;
    let mut archive = Archive {
        tar: tar::Builder::new(BufWriter::new(file)),
        blobs: BTreeSet::new(),
    };
    archive.file("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
    let Layer(layer) = layer;
    archive.blob(layer)?;
    let (mut index, mut docker) = (Vec::new(), Vec::new());
    for image in images {
        let config = Blob::new(config(image, layer).to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, &config),
            "layers": [descriptor(LAYER_TYPE, layer)],
        });
        let manifest = Blob::new(manifest.to_string().into_bytes());
        archive.blob(&config)?;
        archive.blob(&manifest)?;
        let mut entry = descriptor(MANIFEST_TYPE, &manifest);
        if let Some(entry) = entry.as_object_mut() {
            entry.insert("annotations".to_owned(), names(image.name));
        }
        index.push(entry);
        docker.push(json!({
            "Config": place(&config),
            "RepoTags": [image.name],
            "Layers": [place(layer)],
        }));
    }
    let index = json!({ "schemaVersion": 2, "manifests": index });
    archive.file("index.json", &index)?;
    archive.file("manifest.json", &Value::from(docker))?;
    let mut file = archive.tar.into_inner().map_err(failed)?;
    file.flush().map_err(failed)
}

/// What containerd and everybody else call an image in an index: by its whole name and by its tag.
fn names(name: &str) -> Value {
    let tag = name.rsplit_once(':').map(|(_, tag)| tag);
    json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": tag.unwrap_or("latest"),
    })
}

fn config(image: &Image<'_>, layer: &Blob) -> Value {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut run = Map::new();
    run.insert("Entrypoint".to_owned(), json!(image.entrypoint));
    if let Some(path) = image.path {
        run.insert("Env".to_owned(), json!([format!("PATH={path}")]));
    }
    if let Some(signal) = image.stop_signal {
        run.insert("StopSignal".to_owned(), signal.into());
    }
    if !image.labels.is_empty() {
        let labels = image.labels.iter();
        let labels = labels.map(|(name, text)| ((*name).to_owned(), Value::from(*text)));
        run.insert("Labels".to_owned(), labels.collect::<Map<_, _>>().into());
    }
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)] },
    })
}

fn descriptor(media_type: &str, blob: &Blob) -> Value {
    json!({
        "mediaType": media_type,
        "digest": format!("sha256:{}", blob.digest),
        "size": blob.content.len(),
    })
}

fn place(blob: &Blob) -> String {
    format!("blobs/sha256/{}", blob.digest)
}

struct Archive<W: Write> {
    tar: tar::Builder<W>,
    /// What is in it already: images may have a configuration in common.
    blobs: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    fn file(&mut self, path: &str, content: &Value) -> Result<(), ImageError> {
        add(&mut self.tar, path, 0o644, content.to_string().as_bytes())
    }

    fn blob(&mut self, blob: &Blob) -> Result<(), ImageError> {
        let path = place(blob);
        if self.blobs.insert(path.clone()) {
            add(&mut self.tar, &path, 0o644, &blob.content)?;
        }
        Ok(())
    }
}

/// Adds a file of root's.
pub(crate) fn add(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    mode: u32,
    content: &[u8],
) -> Result<(), ImageError> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    archive
        .append_data(&mut header, path, content)
        .map_err(|source| ImageError::Pack {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read};

    use super::*;
    use crate::LayerBuilder;

    fn own_layer() -> Layer {
        let own = std::env::current_exe().unwrap();
        let layer = LayerBuilder::default().program("/bin/own", &own).unwrap();
        layer.finish().unwrap()
    }

    fn written(name: &str, images: &[Image<'_>]) -> Vec<u8> {
        let path = std::env::temp_dir().join(format!("{name}-{}.tar", std::process::id()));
        write(&path, &own_layer(), images).unwrap();
        let content = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        content
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (path, content)
        });
        entries.collect()
    }

    #[test]
    fn both_forms_lead_to_the_same_blobs_whose_names_are_their_digests() {
        let image = Image {
            name: "registry.example/own:1",
            entrypoint: &["/bin/own"],
            ..Image::default()
        };
        let files = files(&written("forms", &[image]));
        let read = |path: &str| -> Value { serde_json::from_slice(&files[path]).unwrap() };
        let blob = |digest: &Value| {
            let digest = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
            format!("blobs/sha256/{digest}")
        };
        for (path, content) in &files {
            if let Some(digest) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(Blob::new(content.clone()).digest, digest);
            }
        }
        let entry = &read("index.json")["manifests"][0];
        let annotation = &entry["annotations"]["io.containerd.image.name"];
        assert_eq!(annotation, "registry.example/own:1");
        let manifest = read(&blob(&entry["digest"]));
        let docker = &read("manifest.json")[0];
        assert_eq!(docker["Config"], blob(&manifest["config"]["digest"]));
        let layer = blob(&manifest["layers"][0]["digest"]);
        assert_eq!(docker["Layers"][0], layer);
        assert_eq!(manifest["layers"][0]["size"], files[&layer].len());
        let config = read(docker["Config"].as_str().unwrap());
        assert_eq!(blob(&config["rootfs"]["diff_ids"][0]), layer);
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/own"]));
        let programs: Vec<String> = self::files(&files[&layer]).into_keys().collect();
        assert_eq!(programs, ["bin/own"]);
    }

    #[test]
    fn the_same_programs_make_the_same_image() {
        let image = || Image {
            name: "registry.example/own:1",
            ..Image::default()
        };
        let [first, second] = ["first", "second"].map(|name| written(name, &[image()]));
        assert!(first == second);
        // Two names of one configuration have its blobs once.
        let other = Image {
            name: "registry.example/other:1",
            ..Image::default()
        };
        let both = files(&written("both", &[image(), other]));
        let blobs = both.keys().filter(|path| path.starts_with("blobs/"));
        assert_eq!(blobs.count(), 3, "layer, configuration, manifest");
    }
}
