"""seqio task registrations, one file per data set; import the one that you need."""
