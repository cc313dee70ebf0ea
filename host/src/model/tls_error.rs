//! Sentences that say why the certificate of PostgreSQL or RabbitMQ is refused, and what to do. Must never decide which
//! authorities are trusted: these are the ones in the machine's own store, or in the files that `SSL_CERT_FILE` and
//! `SSL_CERT_DIR` name in its place.

use std::io;

use rustls::{CertificateError, Error as TlsError};

/// The machine has no usable certificate of an authority.
const NO_AUTHORITY: &str = "this machine trusts no authority: the file in SSL_CERT_FILE or the directory in SSL_CERT_DIR cannot be read, or contains no certificate";

/// What is wrong with the server's certificate and what to do, if a connection failed for that reason.
pub(crate) fn refusal(error: &io::Error) -> Option<&'static str> {
    let inner = error.get_ref()?;
    if inner.is::<rustls_native_certs::Error>() {
        return Some(NO_AUTHORITY);
    }
    let TlsError::InvalidCertificate(error) = inner.downcast_ref()? else { return None };
    Some(match error {
        CertificateError::UnknownIssuer if rustls_native_certs::load_native_certs().certs.is_empty() => NO_AUTHORITY,
        // A bad signature: an authority of the same name is trusted, but it is a different one.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "no authority that this machine trusts has signed it; put the certificate of the authority that signed it into a file, and name the file in SSL_CERT_FILE"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is another host's; name the host in the URL as its certificate does"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired; renew it",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; compare the clock of this machine with that of the authority"
        }
        _ => "it is not valid; ask its authority for another one",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_about_a_certificate_have_a_sentence() {
        let io_error = |error: TlsError| io::Error::new(io::ErrorKind::InvalidData, error);
        // On a machine without any authority the sentence is a different one; both name SSL_CERT_FILE.
        assert!(
            refusal(&io_error(CertificateError::UnknownIssuer.into()))
                .is_some_and(|sentence| sentence.contains("SSL_CERT_FILE"))
        );
        assert!(refusal(&io_error(CertificateError::BadEncoding.into())).is_some());
        assert_eq!(refusal(&io_error(TlsError::DecryptError)), None);
        assert_eq!(refusal(&io::ErrorKind::ConnectionRefused.into()), None);
    }
}
