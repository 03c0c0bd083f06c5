//! The configuration file, checked whole before any socket opens.
