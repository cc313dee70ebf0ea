//! A certificate authority of a test's own, and the certificates that it gives to servers.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use time::{Duration, OffsetDateTime};

pub use testkit::place::Identity;

/// Who signs.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate, which whoever trusts it needs.
    pub certificate: String,
}

impl Authority {
    /// An authority of this name that nobody trusts yet; each is another one.
    ///
    /// # Panics
    ///
    /// When there are no keys to be had.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// The identity of a server on `host`, which expires `days` from now, or has if that is negative.
    ///
    /// # Panics
    ///
    /// When `host` is no name.
    #[must_use]
    pub fn identity(&self, host: &str, days: i64) -> Identity {
        let mut params = params(host, &[host]);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Identity { certificate, key: key.serialize_pem() }
    }
}

fn params(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts).expect("names of hosts");
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - Duration::days(100);
    params
}
