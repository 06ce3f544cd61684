"""The two networks of Gemma 4, target and drafter, and the K/V cache: functions of arrays."""
