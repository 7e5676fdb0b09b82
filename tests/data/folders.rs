//! Image folders: order, labels, damaged images, resuming.

use std::path::Path;

use vitrim::data::{Augment, BatchOrder, DataError, Dataset, ImageFault, Options, Start, Tail, Warning};

use crate::{all, fixture, plain_options};

/// `count` different small images in two class folders, those in `damaged` cut off.
fn make_folder(root: &Path, count: usize, damaged: &[usize]) {
    for i in 0..count {
        let folder = root.join(if i < count / 2 { "a" } else { "b" });
        std::fs::create_dir_all(&folder).unwrap();
        let image = image::RgbImage::from_fn(20, 18, |x, y| image::Rgb([x as u8 * 12, y as u8 * 14, i as u8]));
        let file = folder.join(format!("{i:04}.png"));
        image.save(&file).unwrap();
        if damaged.contains(&i) {
            let bytes = std::fs::read(&file).unwrap();
            std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        }
    }
}

#[test]
fn classes_and_files_are_sorted_by_name() {
    let root = tempfile::tempdir().unwrap();
    for path in ["b/2.png", "b/10.png", "a/deep/er/x.PNG", "a/.hidden.png", ".git/y.png", "c/readme.txt", "loose.jpeg"] {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(fixture("images/rgba.png"), path).unwrap();
    }
    let data = Dataset::open(root.path(), &plain_options()).unwrap();
    assert_eq!(data.class_names(), ["a", "b", "c"]);
    assert_eq!(data.labels(), Some(vec![0, 1, 1]));
    assert!(data.warnings().iter().any(|w| matches!(w, Warning::LooseImages { count: 1, .. })));
    assert!(data.warnings().iter().any(|w| matches!(w, Warning::EmptyClass { .. })));
    assert!(data.check_labels(3).is_ok());
    assert_eq!(
        data.check_labels(4).unwrap_err().to_string().split(": ").last(),
        Some("3 class folders but the model has 4 outputs")
    );
    assert_eq!(data.count_shared(&data.select(&[1])).unwrap(), 3, "the same file three times");
}

#[test]
fn flat_folders_have_no_labels_and_empty_ones_no_images() {
    let root = tempfile::tempdir().unwrap();
    let none = Dataset::open(root.path(), &plain_options()).err().unwrap().to_string();
    assert_eq!(none, format!("no .jpg/.jpeg/.png found under {}", root.path().display()));
    std::fs::copy(fixture("images/grey.jpg"), root.path().join("x.jpg")).unwrap();
    let data = Dataset::open(root.path(), &plain_options()).unwrap();
    assert_eq!((data.len(), data.labels()), (1, None));
    assert!(matches!(data.check_labels(10), Err(DataError::NoLabels { .. })));
    assert!(all(&data, BatchOrder::default(), 3, 1)[0].labels.is_none());
}

#[cfg(unix)]
#[test]
fn link_loops_are_broken() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 4, &[]);
    std::os::unix::fs::symlink(root.path(), root.path().join("a/again")).unwrap();
    std::os::unix::fs::symlink("nowhere", root.path().join("a/dangling.jpg")).unwrap();
    let data = Dataset::open(root.path(), &plain_options()).unwrap();
    assert_eq!(data.len(), 4);
    assert!(matches!(data.warnings(), [Warning::Loop { .. }]));
}

#[test]
fn nothing_is_guessed_about_preprocessing_or_inputs() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 2, &[]);
    let open = |options: &Options| Dataset::open(root.path(), options).err().unwrap();
    let bare = Options { mean: None, ..plain_options() };
    assert!(matches!(open(&bare), DataError::NoPreprocess { .. }));
    let mut two = plain_options();
    two.inputs.push(crate::input("mask", &[None, Some(4)], vitrim::data::ArrayKind::I64));
    assert!(open(&two).to_string().contains("mask [?, 4] int64"), "{}", open(&two));
    let wrong = Options { std: Some(vec![0.0]), ..plain_options() };
    assert_eq!(open(&wrong).to_string(), "--std is [0.0], expected one number or 3, finite and above 0");
}

#[test]
fn batches_do_not_depend_on_the_number_of_threads() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 230, &[17, 101]);
    let data = Dataset::open(root.path(), &plain_options()).unwrap();
    let order = BatchOrder { seed: 7, epoch: 2, shuffle: true, ..BatchOrder::default() };
    let augment = Some(Augment { shift: 2, flip: true });
    let run = |threads| -> Vec<_> {
        let batches = data.batches(order, 16, threads, augment).map(|b| b.unwrap());
        batches.map(|b| (b.inputs, b.labels, b.samples, b.next_slot)).collect()
    };
    let one = run(1);
    assert_eq!(one.iter().map(|b| b.2.len()).sum::<usize>(), 228);
    assert_eq!(one.len(), 15);
    for threads in [2, 3, 8] {
        assert!(one == run(threads), "{threads} threads");
    }
    let plain = all(&data, order, 16, 2);
    assert_eq!(plain[0].samples, one[0].2);
    assert_ne!(plain[0].inputs, one[0].0, "augmentation changes the images");
    let other = BatchOrder { epoch: 3, ..order };
    assert_ne!(all(&data, other, 16, 2)[0].samples, one[0].2);
}

#[test]
fn a_resumed_stream_is_the_rest_of_the_whole_one() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 210, &[3, 50]);
    let order = BatchOrder { seed: 1, epoch: 0, shuffle: true, tail: Tail::Drop, ..BatchOrder::default() };
    let augment = Some(Augment { shift: 3, flip: false });
    let stream = |start| -> Vec<_> {
        // A new data set each time: a new process knows nothing of the damaged images.
        let data = Dataset::open(root.path(), &plain_options()).unwrap();
        let batches = data.batches(BatchOrder { start, ..order }, 8, 3, augment).map(|b| b.unwrap());
        batches.map(|b| (b.inputs, b.labels, b.samples, b.next_slot)).collect()
    };
    let whole = stream(Start::Batch(0));
    assert_eq!(whole.len(), 26);
    for k in [1, 5, 25] {
        assert!(whole[k..] == stream(Start::Batch(k)), "from batch {k}");
        assert!(whole[k..] == stream(Start::Slot(whole[k - 1].3)), "from the slot before batch {k}");
    }
    assert!(stream(Start::Batch(26)).is_empty());
}

#[test]
fn damaged_images_are_named_once_and_left_out() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 200, &[9]);
    std::fs::write(root.path().join("a/0000.png"), b"").unwrap();
    let data = Dataset::open(root.path(), &plain_options()).unwrap();
    let first = all(&data, BatchOrder::default(), 10, 2);
    assert_eq!(first[0].samples, vec![1, 2, 3, 4, 5, 6, 7, 8, 10, 11]);
    let named: Vec<_> = first.iter().flat_map(|b| &b.skipped).map(|s| s.fault.clone()).collect();
    assert_eq!(named, vec![ImageFault::Empty, ImageFault::Truncated]);
    let again = all(&data, BatchOrder::default(), 10, 2);
    assert!(again.iter().all(|b| b.skipped.is_empty()));
    assert_eq!(data.skipped().len(), 2);
    assert!(data.skipped()[0].to_string().ends_with("0000.png: file is empty"));
    assert_eq!(again.iter().map(|b| b.count).sum::<usize>(), 198);
}

#[test]
fn more_than_one_percent_stops_and_strict_stops_at_the_first() {
    let root = tempfile::tempdir().unwrap();
    make_folder(root.path(), 100, &[5, 6]);
    let run = |options: &Options| -> Vec<_> {
        let data = Dataset::open(root.path(), options).unwrap();
        data.batches(BatchOrder::default(), 4, 2, None).collect()
    };
    let loose = run(&plain_options());
    assert_eq!(loose.len(), 2, "one good batch, one error, then the end");
    assert!(matches!(loose[1], Err(DataError::TooManyBad { bad: 2, total: 100, strict: false, .. })));
    let strict = run(&Options { strict: true, ..plain_options() });
    assert!(matches!(strict[1], Err(DataError::TooManyBad { bad: 1, strict: true, .. })));
    let message = strict[1].as_ref().unwrap_err().to_string();
    assert!(message.ends_with("0005.png: file is truncated"), "{message}");
}

#[test]
fn huge_headers_cost_no_memory() {
    let mut png = std::fs::read(fixture("images/grey.png")).unwrap();
    png[16..24].copy_from_slice(&[0, 0, 0xfd, 0xe8, 0, 0, 0xfd, 0xe8]);
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    let fault = vitrim::data::decode(&png, 3, 64_000_000).unwrap_err();
    assert_eq!(fault.to_string(), "image too large (65000 x 65000, limit 64 Mpx)");
    let mut jpeg = std::fs::read(fixture("images/grey.jpg")).unwrap();
    let sof = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    jpeg[sof + 5..sof + 9].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(vitrim::data::decode(&jpeg, 3, 64_000_000), Err(ImageFault::TooLarge { .. })));
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0u32, |crc, b| (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 }))
}

#[test]
fn cut_and_changed_images_never_panic() {
    for name in ["palette.png", "exif_rotated.jpg", "china_422_progressive.jpg", "cmyk.jpg"] {
        let whole = std::fs::read(fixture("images").join(name)).unwrap();
        assert!(vitrim::data::decode(&whole, 3, 1 << 20).is_ok(), "{name}");
        for part in 0..60 {
            let cut = &whole[..whole.len() * part / 60];
            assert!(vitrim::data::decode(cut, 3, 1 << 20).is_err(), "{name} cut at {}", cut.len());
            let mut changed = whole.clone();
            let at = whole.len() * part / 60;
            changed[at] ^= 0x55;
            if let Ok(pixels) = vitrim::data::decode(&changed, 3, 1 << 20) {
                assert_eq!(pixels.bytes.len(), pixels.height * pixels.width * 3);
            }
        }
    }
}

#[test]
fn randomly_changed_images_never_bring_the_decoder_down() {
    let mut state = 12345u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut decoded = 0;
    for entry in std::fs::read_dir(fixture("images")).unwrap() {
        let path = entry.unwrap().path();
        let whole = std::fs::read(&path).unwrap();
        for _ in 0..100 {
            let mut changed = whole.clone();
            for _ in 0..1 + random() % 4 {
                let at = (random() % changed.len() as u64) as usize;
                changed[at] = random() as u8;
            }
            match vitrim::data::decode(&changed, 3, 1 << 20) {
                Ok(pixels) => {
                    assert_eq!(pixels.bytes.len(), pixels.height * pixels.width * 3);
                    decoded += 1;
                }
                // What a caught panic is called.
                Err(fault) => assert!(!fault.to_string().contains("gave up"), "{}: {fault}", path.display()),
            }
        }
    }
    assert!(decoded > 100, "{decoded}");
}
