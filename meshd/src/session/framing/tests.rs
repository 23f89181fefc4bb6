use super::*;
use tokio::io::{DuplexStream, duplex};

fn remote() -> Remote {
    Remote::At(std::net::SocketAddr::from(([192, 0, 2, 1], 6783)))
}

/// Our end of a session, and the bare bytes of the other end.
fn bare(buffer: usize) -> (FrameReader, FrameWriter, DuplexStream) {
    let (ours, theirs) = duplex(buffer);
    let (reader, writer) = split_with(remote(), ours, Duration::from_millis(200));
    (reader, writer, theirs)
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

#[tokio::test]
async fn frames_on_the_wire_are_a_length_and_the_bytes() {
    let (mut reader, writer, mut theirs) = bare(1000);
    writer.send(b"abc").await.unwrap();
    let mut wire = [0; 7];
    theirs.read_exact(&mut wire).await.unwrap();
    assert_eq!(wire, [3, 0, 0, 0, b'a', b'b', b'c']);
    theirs.write_all(&[2, 0, 0, 0, 7, 8, 1, 0, 0, 0, 9]).await.unwrap();
    assert_eq!(*reader.recv().await.unwrap().unwrap(), [7, 8]);
    assert_eq!(*reader.recv().await.unwrap().unwrap(), [9]);
}

#[tokio::test]
async fn an_empty_or_too_long_frame_ends_the_session_before_anything_is_allocated() {
    for (length, max) in [(0, MAX_FRAME_UNPROVEN), (65_537, MAX_FRAME_UNPROVEN), (u32::MAX, MAX_FRAME_MEMBER)]
    {
        let (mut reader, _writer, mut theirs) = bare(1000);
        reader.set_max_frame(max);
        theirs.write_all(&length.to_le_bytes()).await.unwrap();
        let error = reader.recv().await.unwrap_err();
        assert!(
            matches!(error, SessionError::FrameLength { direction: "from", found, max: limit, .. }
                if found == length as usize && limit == max),
            "{error}"
        );
        assert_eq!(reader.body.capacity(), 0);
        let again = reader.recv().await.unwrap_err();
        if length == 65_537 {
            assert!(matches!(again, SessionError::FrameLength { .. }), "{again}");
        } else {
            assert!(matches!(again, SessionError::Closed { .. }), "{again}");
        }
    }
}

#[tokio::test]
async fn a_frame_that_came_before_the_limit_was_raised_can_be_received_after_it() {
    let (mut reader, _writer, mut theirs) = bare(200_000);
    theirs.write_all(&frame(&[7; 70_000])).await.unwrap();
    assert!(matches!(reader.recv().await, Err(SessionError::FrameLength { .. })));
    reader.set_max_frame(MAX_FRAME_MEMBER);
    assert_eq!(*reader.recv().await.unwrap().unwrap(), [7; 70_000]);
}

#[tokio::test]
async fn memory_grows_with_what_arrives_and_not_with_what_is_announced() {
    let (mut reader, _writer, mut theirs) = bare(1000);
    reader.set_max_frame(MAX_FRAME_MEMBER);
    theirs.write_all(&(MAX_FRAME_MEMBER as u32).to_le_bytes()).await.unwrap();
    theirs.write_all(&[1; 100]).await.unwrap();
    assert!(timeout(Duration::from_millis(50), reader.recv()).await.is_err(), "not complete");
    assert_eq!(reader.body.len(), FIRST_READ);
}

#[tokio::test]
async fn the_limit_can_be_raised_but_not_beyond_that_for_members() {
    let (mut reader, writer, mut theirs) = bare(16 << 20);
    let long = vec![5; MAX_FRAME_MEMBER];
    let error = writer.send(&long).await.unwrap_err();
    assert!(matches!(error, SessionError::FrameLength { direction: "to", .. }), "{error}");
    assert!(writer.send(&[]).await.is_err(), "no empty frames");
    writer.set_max_frame(usize::MAX);
    reader.set_max_frame(usize::MAX);
    writer.send(&long).await.unwrap();
    assert!(matches!(writer.try_send(&[0; MAX_FRAME_MEMBER + 1]), Err(SessionError::FrameLength { .. })));
    theirs.write_all(&frame(&long)).await.unwrap();
    assert_eq!(*reader.recv().await.unwrap().unwrap(), long);
}

#[tokio::test]
async fn a_reader_that_is_interrupted_at_any_byte_loses_nothing() {
    let (mut reader, _writer, mut theirs) = bare(1000);
    let wire = [frame(b"first"), frame(b"second frame"), frame(b"3")].concat();
    tokio::spawn(async move {
        for byte in wire {
            theirs.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    });
    let mut got = Vec::new();
    let mut interrupted = 0;
    loop {
        match timeout(Duration::from_millis(1), reader.recv()).await {
            Err(_) => interrupted += 1,
            Ok(Ok(Some(frame))) => got.push(frame.to_vec()),
            Ok(Ok(None)) => break,
            Ok(Err(error)) => panic!("{error}"),
        }
    }
    assert_eq!(got, [b"first".to_vec(), b"second frame".to_vec(), b"3".to_vec()]);
    assert!(interrupted > 10, "only {interrupted} interruptions");
}

#[tokio::test]
async fn an_end_between_frames_is_a_farewell_and_within_one_it_is_not() {
    let (mut reader, _writer, mut theirs) = bare(1000);
    theirs.write_all(&frame(b"last")).await.unwrap();
    drop(theirs);
    assert_eq!(*reader.recv().await.unwrap().unwrap(), b"last");
    assert!(reader.recv().await.unwrap().is_none());
    assert!(matches!(reader.recv().await, Err(SessionError::Closed { .. })));
    for cut in 1..8 {
        let (mut reader, _writer, mut theirs) = bare(1000);
        theirs.write_all(&frame(b"last")[..cut]).await.unwrap();
        drop(theirs);
        assert!(matches!(reader.recv().await, Err(SessionError::CutOff { .. })), "cut at {cut}");
    }
}

#[tokio::test]
async fn the_queue_is_bounded_and_a_peer_that_takes_nothing_is_given_up() {
    let (mut reader, writer, theirs) = bare(1000);
    writer.set_max_frame(MAX_FRAME_MEMBER);
    let long = vec![1; 3 << 20];
    let mut queued = 0;
    let error = loop {
        match writer.try_send(&long) {
            Ok(()) => queued += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SessionError::QueueFull { .. }), "{error}");
    assert_eq!(queued, 2, "8 MiB of queue hold two frames of 3 MiB");
    // Both directions of the session learn it, and so does whoever waits for room.
    let error = writer.send(&long).await.unwrap_err();
    assert!(matches!(error, SessionError::Stalled { .. }), "{error}");
    let error = reader.recv().await.unwrap_err();
    assert!(matches!(error, SessionError::Stalled { .. }), "{error}");
    assert!(matches!(writer.try_send(b"x"), Err(SessionError::Stalled { .. })));
    drop(theirs);
}

#[tokio::test]
async fn many_small_frames_are_bounded_too() {
    let (_reader, writer, _theirs) = bare(10);
    let mut queued = 0;
    while writer.try_send(b"small").is_ok() {
        queued += 1;
        assert!(queued <= QUEUE_FRAMES + 1);
    }
    assert!(matches!(writer.try_send(b"small"), Err(SessionError::QueueFull { .. })));
}

#[tokio::test]
async fn what_is_queued_is_sent_when_the_writer_is_dropped_and_not_when_it_is_aborted() {
    let (_reader, writer, mut theirs) = bare(100);
    for i in 0..50u8 {
        writer.send(&[i; 100]).await.unwrap();
    }
    drop(writer);
    let mut wire = Vec::new();
    theirs.read_to_end(&mut wire).await.unwrap();
    assert_eq!(wire.len(), 50 * 104);

    let (reader, writer, mut theirs) = bare(100);
    for i in 0..50u8 {
        writer.send(&[i; 100]).await.unwrap();
    }
    writer.abort();
    drop(reader);
    let mut wire = Vec::new();
    theirs.read_to_end(&mut wire).await.unwrap();
    assert!(wire.len() <= 200, "{} bytes after the abort", wire.len());
    assert!(matches!(writer.send(b"x").await, Err(SessionError::Closed { .. })));
}

#[tokio::test]
async fn frames_of_several_senders_stay_whole() {
    let (_reader, writer, mut theirs) = bare(64);
    for sender in 0..4u8 {
        let writer = writer.clone();
        tokio::spawn(async move {
            for _ in 0..50 {
                writer.send(&[sender; 77]).await.unwrap();
            }
        });
    }
    drop(writer);
    let mut wire = Vec::new();
    theirs.read_to_end(&mut wire).await.unwrap();
    assert_eq!(wire.len(), 200 * 81);
    for chunk in wire.chunks(81) {
        assert_eq!(chunk[..4], [77, 0, 0, 0]);
        assert!(chunk[4..].iter().all(|byte| *byte == chunk[4]));
    }
}
