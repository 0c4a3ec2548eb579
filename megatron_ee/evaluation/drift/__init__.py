"""Whether a certified risk is still kept: audits, and sequential tests of their losses."""
