"""The stream contract's tests, shared by the tiers that have a device with streams. One process tests one device."""
