//! The client beside endpoints that are silent, wrong, or of another etcd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;
use rcgen::{CertificateParams, KeyPair};

use super::fake::{Fake, Reply, nothing, table};
use super::*;

fn within(seconds: u64) -> Asking<'static> {
    Asking { until: Instant::now() + Duration::from_secs(seconds), cluster: None }
}

fn of(cluster: &str) -> Asking<'_> {
    Asking { cluster: Some(cluster), ..within(30) }
}

/// An address that forgets its connections, as a translating one does.
#[tokio::test]
async fn silence_on_a_connection_that_was_kept_is_not_the_endpoints() -> Result<()> {
    let forgets = |_, question| if question == 0 { nothing("7") } else { Reply::Silent };
    let fake = Fake::start(forgets).await?;
    let etcd = Etcd::new(&table(&[&fake], 3)?);
    for asked in 1..=2 {
        assert_eq!(etcd.get("", within(10)).await?.cluster, "7");
        assert_eq!(fake.connections(), asked);
    }
    Ok(())
}

#[tokio::test]
async fn a_connection_is_kept_and_not_used_again_when_it_was_idle_for_long() -> Result<()> {
    let fake = Fake::start(|_, _| nothing("7")).await?;
    let etcd = Etcd::new(&table(&[&fake], 10)?);
    for _ in 0..2 {
        etcd.get("", within(30)).await?;
    }
    assert_eq!(fake.connections(), 1);
    let etcd = Etcd { idle_max: Duration::ZERO, ..etcd };
    etcd.get("", within(30)).await?;
    assert_eq!(fake.connections(), 2);
    Ok(())
}

#[tokio::test]
async fn an_endpoint_that_answers_wrongly_is_passed_over() -> Result<()> {
    let page = Fake::start(|_, _| Reply::Says(200, "<html>".into())).await?;
    let other = Fake::start(|_, _| nothing("8")).await?;
    let good = Fake::start(|_, _| nothing("7")).await?;
    let etcd = Etcd::new(&table(&[&page, &other, &good], 10)?);
    for _ in 0..3 {
        assert_eq!(etcd.get("", of("7")).await?.cluster, "7");
    }
    assert_eq!((page.connections(), other.connections(), good.connections()), (1, 1, 1));
    let said = etcd.get("", of("9")).await.unwrap_err();
    assert!(matches!(&said, EtcdError::NoAnswer(each) if each.contains("is not understood")), "{said}");
    let alone = Etcd::new(&table(&[&page], 10)?).get("", within(30)).await.unwrap_err();
    assert!(matches!(&alone, EtcdError::NoAnswer(each) if each.contains("no etcd")), "{alone}");
    Ok(())
}

#[tokio::test]
async fn each_endpoint_is_looked_at_and_most_of_them_are_the_usual_etcd() -> Result<()> {
    let other = Fake::start(|_, _| nothing("8")).await?;
    let [one, two] = [Fake::start(|_, _| nothing("7")).await?, Fake::start(|_, _| nothing("7")).await?];
    let etcd = Etcd::new(&table(&[&other, &one, &two], 10)?);
    assert_eq!(etcd.usual(), None);
    let seen = etcd.each().await;
    let clusters: Vec<_> = seen.iter().filter_map(|seen| seen.cluster.as_deref().ok()).collect();
    assert_eq!((clusters, etcd.usual().as_deref()), (vec!["8", "7", "7"], Some("7")));
    assert_eq!(usual(&seen[..2]), Some("8"), "as many: the one that is named first");
    Ok(())
}

#[tokio::test]
async fn an_endpoint_that_is_silent_leaves_time_for_the_next() -> Result<()> {
    let silent = Fake::start(|_, _| Reply::Silent).await?;
    let good = Fake::start(|_, _| nothing("7")).await?;
    // As long as everything together may take.
    let etcd = Etcd::new(&table(&[&silent, &good], 10)?);
    assert_eq!(etcd.get("", within(10)).await?.cluster, "7");
    Ok(())
}

#[tokio::test]
async fn a_question_that_is_given_up_leaves_the_next_one_to_another_endpoint() -> Result<()> {
    let silent = Fake::start(|_, _| Reply::Silent).await?;
    let good = Fake::start(|_, _| nothing("7")).await?;
    let etcd = Etcd::new(&table(&[&silent, &good], 10)?);
    let asked = async {
        while silent.connections() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = etcd.get("", within(30)) => panic!("the first endpoint is silent"),
        () = asked => {}
    }
    assert_eq!(etcd.get("", within(30)).await?.cluster, "7");
    assert_eq!(silent.connections(), 1);
    Ok(())
}

#[test]
fn each_endpoint_has_its_share_of_the_time() {
    let [s1, s2, s10] = [1, 2, 10].map(Duration::from_secs);
    assert_eq!(share(s2, s10, 3), s2);
    assert_eq!(share(s10, s10, 1), s10);
    assert_eq!(share(s10, s10, 5), s2);
    assert_eq!(share(s10, s2, 9), s1);
    // All of nine silent ones are asked within ten seconds.
    let mut rest = s10;
    for left in (1..=9).rev() {
        let one = share(s2, rest, left);
        assert!(one >= s1, "{one:?} for the one before {left}");
        rest -= one;
    }
}

#[tokio::test]
async fn an_etcd_with_users_is_known_and_long_texts_are_cut() -> Result<()> {
    for (status, text) in [
        (400, r#"{"error":"etcdserver: user name is empty","code":3}"#.to_owned()),
        (403, r#"{"error":"etcdserver: permission denied","code":7}"#.to_owned()),
        (401, r#"{"error":"etcdserver: invalid auth token","code":16}"#.to_owned()),
        (500, "\x1b[31m".repeat(5000)),
    ] {
        let fake = Fake::start(move |_, _| Reply::Says(status, text.clone())).await?;
        let said = Etcd::new(&table(&[&fake], 10)?).get("", within(30)).await.unwrap_err().to_string();
        assert!(said.contains(&status.to_string()), "{said}");
        assert_eq!(said.contains("with auth off"), status < 500, "{said}");
        assert!(said.chars().count() < 700 && !said.contains('\x1b'), "{said}");
    }
    Ok(())
}

/// Writes a certificate and its key, and a certificate of another one.
fn issue(folder: &Path, name: &str) -> Result<()> {
    let key = KeyPair::generate()?;
    let params = CertificateParams::new(vec!["127.0.0.1".into()])?;
    for (file, text) in [("", params.self_signed(&key)?.pem()), ("-key", key.serialize_pem())] {
        // Another file each time, whatever the clock of the file system says.
        let new = folder.join("new");
        fs::write(&new, text)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
        fs::rename(new, folder.join(format!("{name}{file}.pem")))?;
    }
    Ok(())
}

#[tokio::test]
async fn an_etcd_without_tls_1_3_is_named_as_such() -> Result<()> {
    let folder = tempfile::tempdir()?;
    issue(folder.path(), "ca")?;
    // The alert "protocol version", and "handshake failure".
    for alert in [b"\x15\x03\x03\x00\x02\x02\x46", b"\x15\x03\x03\x00\x02\x02\x28"] {
        let fake = Fake::start(move |_, _| Reply::Raw(alert)).await?;
        let mut config = table(&[&fake], 10)?;
        config.endpoints[0].tls = true;
        config.ca = Some(folder.path().join("ca.pem"));
        let said = Etcd::new(&config).get("", within(30)).await.unwrap_err().to_string();
        assert!(said.contains("etcd does from 3.5.8 on"), "{said}");
    }
    Ok(())
}

#[test]
fn files_are_read_when_they_have_changed_and_a_key_fits_its_certificate() -> Result<()> {
    let folder = tempfile::tempdir()?;
    issue(folder.path(), "a")?;
    issue(folder.path(), "b")?;
    let path = |name: &str| folder.path().join(name);
    let own = |cert: &str| Some((path(cert), path("a-key.pem")));
    let mixed = Files::new(None, own("b.pem")).settings_anew().unwrap_err().to_string();
    assert!(mixed.contains("b.pem") && mixed.contains("a-key.pem"), "{mixed}");
    let files = Files::new(Some(path("a.pem")), own("a.pem"));
    let first = files.settings()?;
    assert!(std::sync::Arc::ptr_eq(&first, &files.settings()?), "the key was read again");
    issue(folder.path(), "a")?;
    let second = files.settings()?;
    assert!(!std::sync::Arc::ptr_eq(&first, &second), "a new key was not taken");
    fs::write(path("a.pem"), "half")?;
    assert!(std::sync::Arc::ptr_eq(&second, &files.settings()?), "half a file was taken");
    assert!(files.settings_anew().is_err());
    issue(folder.path(), "a")?;
    assert!(!std::sync::Arc::ptr_eq(&second, &files.settings()?), "the next ones were not taken");
    Ok(())
}
