//! QMP client with fd passing, typed commands and events. Knows no network.
