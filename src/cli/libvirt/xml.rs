//! Looks for elements in libvirt's XML. libvirt writes it itself, in one way: a tag on one line, values in single
//! quotes, and no element of these within another of its name. What users have put into it comes as text, which
//! has no `<`, or below `<metadata>`.

/// libvirt's XML of something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Xml<'a>(&'a str);

impl<'a> Xml<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The elements of that name, in order; none of `<metadata>`.
    pub(super) fn all(self, name: &str) -> Vec<Xml<'a>> {
        let (start, end) = (format!("<{name}"), format!("</{name}>"));
        let mut found = Vec::new();
        for part in self.own() {
            let mut rest = part;
            while let Some(at) = rest.find(&start) {
                rest = &rest[at..];
                let after = &rest[start.len()..];
                if !after.starts_with([' ', '>', '/']) {
                    rest = after;
                    continue;
                }
                let Some(tag) = rest.find('>') else { break };
                let whole = match rest[..tag].ends_with('/') {
                    true => Some(tag + 1),
                    false => rest.find(&end).map(|at| at + end.len()),
                };
                let Some(whole) = whole else { break };
                found.push(Xml(&rest[..whole]));
                rest = &rest[whole..];
            }
        }
        found
    }

    /// What is around `<metadata>`.
    fn own(self) -> impl Iterator<Item = &'a str> {
        let (before, rest) = self.0.split_once("<metadata>").unwrap_or((self.0, ""));
        let after = rest.split_once("</metadata>").map_or("", |(_, after)| after);
        [before, after].into_iter()
    }

    pub(super) fn first(self, name: &str) -> Option<Xml<'a>> {
        self.all(name).into_iter().next()
    }

    pub(super) fn has(self, name: &str) -> bool {
        self.first(name).is_some()
    }

    /// An attribute of its own tag.
    pub(super) fn attribute(self, name: &str) -> Option<String> {
        let tag = self.0.split('>').next()?;
        let value = tag.split_once(&format!(" {name}='"))?.1.split('\'').next()?;
        Some(plain(value))
    }

    pub(super) fn is(self, attribute: &str, value: &str) -> bool {
        self.attribute(attribute).as_deref() == Some(value)
    }

    /// Its text.
    pub(super) fn text(self) -> String {
        plain(
            self.0.split_once('>').map_or("", |(_, rest)| rest).split('<').next().unwrap_or_default().trim(),
        )
    }
}

fn plain(text: &str) -> String {
    let names = [("&lt;", "<"), ("&gt;", ">"), ("&apos;", "'"), ("&quot;", "\""), ("&amp;", "&")];
    names.iter().fold(text.to_owned(), |text, (name, plain)| text.replace(name, plain))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_with_what_they_have() {
        let text = "<domain type='kvm'>\n  <metadata>\n    <app:disk x='1'/><disk type='mine'/>\n  </metadata>\n  \
                    <disks/><disk type='file' device='disk'>\n    <source file='/it&apos;s &amp;c'/>\n  </disk>\n  \
                    <disk type='block'/>\n  <loader readonly='yes'>/code.fd</loader>\n</domain>";
        let xml = Xml::new(text);
        let disks = xml.all("disk");
        assert_eq!(disks.len(), 2);
        assert!(disks[0].is("type", "file") && disks[1].is("type", "block"));
        assert_eq!(disks[0].first("source").unwrap().attribute("file").unwrap(), "/it's &c");
        assert_eq!(disks[1].first("source").map(Xml::text), None);
        assert_eq!(xml.first("loader").unwrap().text(), "/code.fd");
        assert!(!xml.has("tpm") && xml.is("type", "kvm") && !xml.is("device", "disk"));
        for cut in 0..text.len() {
            if let Some(part) = text.get(..cut) {
                assert!(Xml::new(part).all("disk").len() <= 2);
            }
        }
    }
}
