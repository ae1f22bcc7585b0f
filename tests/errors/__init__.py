"""Every message that a user can cause, in whole: to read these files is to read what the program says."""
