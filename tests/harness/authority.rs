//! A certificate authority for one test, and the server certificates that it signs.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use time::{Duration, OffsetDateTime};

pub use testkit::place::Identity;

/// A certificate authority.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's own certificate, in PEM. A client that shall trust the authority needs it.
    pub certificate: String,
}

impl Authority {
    /// Makes a new authority with this name. Two authorities with the same name have different keys.
    ///
    /// # Panics
    ///
    /// When no key can be generated.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = certificate_params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// Signs a certificate for a server on `host` that expires in `days` days. A negative number makes a certificate
    /// that has already expired.
    ///
    /// # Panics
    ///
    /// When `host` is not a valid host name.
    #[must_use]
    pub fn identity(&self, host: &str, days: i64) -> Identity {
        let mut params = certificate_params(host, &[host]);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Identity { certificate, key: key.serialize_pem() }
    }
}

fn certificate_params(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts).expect("names of hosts");
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - Duration::days(100);
    params
}
