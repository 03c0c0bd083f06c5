//! An opened CA that signs. While one CA replaces another the folder has two: the first certificate of
//! `ca-cert.pem` is the one that issues, both sign lists of what is revoked.

use std::path::Path;

use rcgen::{
    Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::error::PkiError;
use super::request::{HostRequest, Made, alt_names, random_serial, validity};
use super::{files, report};
use crate::net::credentials::read_certificates;

/// An opened CA: certificate and key belong together and are valid now.
pub(super) struct Authority {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) cert: CertificateDer<'static>,
    /// All of `ca-cert.pem`: whom hosts trust.
    pub(super) cert_pem: String,
    pub(super) not_after: OffsetDateTime,
    /// The place of its key in `ca-key.pem`.
    pub(super) key_place: usize,
}

impl Authority {
    /// The one that issues.
    pub(super) fn open(dir: &Path) -> Result<Self, PkiError> {
        let (certs, keys) = read(dir)?;
        let first = certs.first().ok_or_else(|| PkiError::NoCa { dir: dir.to_owned() })?;
        Self::of(dir, first, &keys)?.ok_or_else(|| PkiError::CaMismatch { dir: dir.to_owned() })
    }

    /// All whose key is here, the one that issues first. One whose time is over signs no more.
    pub(super) fn all(dir: &Path) -> Result<Vec<Self>, PkiError> {
        let (certs, keys) = read(dir)?;
        let mut all = vec![Self::open(dir)?];
        for cert in certs.iter().skip(1) {
            match Self::of(dir, cert, &keys) {
                Ok(found) => all.extend(found),
                Err(PkiError::CaNotValid { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(all)
    }

    /// The CA of a certificate; none if its key is not among these.
    fn of(
        dir: &Path,
        der: &CertificateDer<'static>,
        keys: &[PrivateKeyDer<'static>],
    ) -> Result<Option<Self>, PkiError> {
        let (cert_path, key_path) = (dir.join("ca-cert.pem"), dir.join("ca-key.pem"));
        let damaged = |path: &Path, problem| PkiError::Damaged { path: path.to_owned(), problem };
        let undecodable = || damaged(&cert_path, "its certificate can't be decoded");
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| undecodable())?;
        for (key_place, key) in keys.iter().enumerate() {
            let key = KeyPair::try_from(key)
                .map_err(|_| damaged(&key_path, "it holds no private key that can be used"))?;
            if parsed.public_key().raw != key.subject_public_key_info() {
                continue;
            }
            let not_before = parsed.validity().not_before.to_datetime();
            let not_after = parsed.validity().not_after.to_datetime();
            let now = OffsetDateTime::now_utc();
            if now < not_before || now > not_after {
                return Err(PkiError::CaNotValid { dir: dir.to_owned(), not_before, not_after });
            }
            let issuer = Issuer::from_ca_cert_der(der, key).map_err(|_| undecodable())?;
            let cert_pem = files::read_text(&cert_path)?;
            return Ok(Some(Self { issuer, cert: der.clone(), cert_pem, not_after, key_place }));
        }
        Ok(None)
    }

    /// Signs a certificate for whoever has `key`.
    pub(super) fn sign_host(
        &self,
        request: &HostRequest,
        target: &Path,
        key: &impl PublicKeyData,
    ) -> Result<(Certificate, Made), PkiError> {
        let making = |source| PkiError::Making { name: request.name.to_string(), source };
        let serial = random_serial()?;
        let (not_before, wanted) = validity(request.days)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, request.name.as_str());
        params.subject_alt_names = alt_names(request)?;
        params.is_ca = IsCa::ExplicitNoCa;
        // keyEncipherment means nothing to TLS 1.3 and an EC key, but GnuTLS, and so QEMU,
        // refuses a certificate without it.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        (params.not_before, params.not_after) = (not_before, wanted.min(self.not_after));
        let cert = params.signed_by(key, &self.issuer).map_err(making)?;
        let made = Made {
            dir: target.to_owned(),
            cert: target.join("cert.pem"),
            not_after: params.not_after,
            cut_short: wanted > self.not_after,
            serial: report::hex(serial.as_ref()),
            left_over: None,
        };
        Ok((cert, made))
    }
}

type Files = (Vec<CertificateDer<'static>>, Vec<PrivateKeyDer<'static>>);

/// The certificates and keys of the folder, in their order.
fn read(dir: &Path) -> Result<Files, PkiError> {
    let (cert_path, key_path) = (dir.join("ca-cert.pem"), dir.join("ca-key.pem"));
    if !cert_path.exists() || !key_path.exists() {
        return Err(PkiError::NoCa { dir: dir.to_owned() });
    }
    let text = files::read_text(&key_path)?;
    let keys: Result<Vec<_>, _> = PrivateKeyDer::pem_slice_iter(text.as_bytes()).collect();
    let damaged =
        || PkiError::Damaged { path: key_path.clone(), problem: "it holds no private key that can be used" };
    let keys = keys.map_err(|_| damaged())?;
    if keys.is_empty() {
        return Err(damaged());
    }
    Ok((read_certificates("CA certificate", &cert_path)?, keys))
}
