"""Which of an implementation's own choices is fastest on this device."""
