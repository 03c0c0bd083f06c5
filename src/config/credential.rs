//! Files that systemd has given to this service, by a name of its own in the place of a path.

use std::path::{Path, PathBuf};

/// What a path begins with that is a credential's name (systemd.exec(5), `LoadCredential=`).
const CREDENTIAL: &str = "credential:";

/// Puts paths in the place of credentials' names, in a table's files.
/// Errors: the key, and what is wrong with its value.
pub(super) fn find<'a>(
    table: &str,
    files: impl Iterator<Item = (&'static str, &'a mut PathBuf)>,
    folder: Option<&Path>,
) -> Result<(), (String, String)> {
    for (key, file) in files {
        let Some(name) = file.to_str().and_then(|text| text.strip_prefix(CREDENTIAL)) else { continue };
        let problem = match folder {
            _ if name.is_empty() || name.contains('/') => "a credential's name has no `/`".to_owned(),
            Some(folder) => {
                *file = folder.join(name);
                continue;
            }
            None => format!(
                "this process was given no credentials ($CREDENTIALS_DIRECTORY): \
                 `LoadCredential={name}:PATH` in the unit gives it this one"
            ),
        };
        return Err((format!("{table}.{key}"), problem));
    }
    Ok(())
}
