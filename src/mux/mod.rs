//! The session protocol, sans-I/O: frames, streams, credit, scheduling, the replay log. Bytes and std only.
