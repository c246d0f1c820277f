"""The checks of the battery, one file each: an `ID`, and `check`, a pure function from the evidence to an answer."""
