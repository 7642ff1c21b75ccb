//! Stores that go away, and those that write when they die.
