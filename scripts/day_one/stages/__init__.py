"""The stages of a first day; each module has one `STAGE`."""
