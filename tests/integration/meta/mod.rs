//! The source itself: hygiene and dependencies.

mod dependencies;
mod pages;
mod prose;
mod tidy;
