//! Why a server's certificate is refused, in words, for both servers. Whom we trust is what the machine says: its own store,
//! or what `SSL_CERT_FILE` and `SSL_CERT_DIR` name in its place.

use std::io;

use rustls::{CertificateError as Wrong, Error as TlsError};

/// What was named is of no use.
const NOBODY: &str =
    "this machine trusts nobody: what SSL_CERT_FILE or SSL_CERT_DIR names cannot be read, or has no certificate in it";

/// What is wrong with the server's certificate and what to do, if that is why a connection could not be made.
pub(crate) fn refusal(error: &io::Error) -> Option<&'static str> {
    let inner = error.get_ref()?;
    if inner.is::<rustls_native_certs::Error>() {
        return Some(NOBODY);
    }
    let TlsError::InvalidCertificate(wrong) = inner.downcast_ref()? else { return None };
    Some(match wrong {
        Wrong::UnknownIssuer if rustls_native_certs::load_native_certs().certs.is_empty() => NOBODY,
        // A bad signature: the authority that we trust has the same name, and is another.
        Wrong::UnknownIssuer | Wrong::BadSignature => {
            "nobody whom we trust has signed it; put the certificate of the authority that has into a file, and name the file in SSL_CERT_FILE"
        }
        Wrong::NotValidForName | Wrong::NotValidForNameContext { .. } => {
            "it is another host's; name the host in the URL as its certificate does"
        }
        Wrong::Expired | Wrong::ExpiredContext { .. } => "it has expired; renew it",
        Wrong::NotValidYet | Wrong::NotValidYetContext { .. } => {
            "it is not valid yet; compare the clock of this machine with that of the authority"
        }
        _ => "it is not as it should be; have the authority make another one",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_certificate_is_refused_for_what_is_wrong_with_it() {
        let because = |error: TlsError| io::Error::new(io::ErrorKind::InvalidData, error);
        // Two sentences: where there is no certificate at all, the other one.
        assert!(refusal(&because(Wrong::UnknownIssuer.into())).is_some_and(|why| why.contains("SSL_CERT_FILE")));
        assert!(refusal(&because(Wrong::BadEncoding.into())).is_some());
        assert_eq!(refusal(&because(TlsError::DecryptError)), None);
        assert_eq!(refusal(&io::ErrorKind::ConnectionRefused.into()), None);
    }
}
