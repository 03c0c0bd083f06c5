//! Makes and checks the certificates that hosts trust each other by. Knows no network.
