//! Whatever is done in whatever order comes to what a few maps would come to.
