//! Who asks for pods, each in words of their own that are translated here.

pub mod containerd;
