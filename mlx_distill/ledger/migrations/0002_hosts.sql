-- A process is known by its number only on the machine, and in the container, that it runs in: host is their
-- name, for people; pid_space says whose numbers they are (NULL: of an older program).
ALTER TABLE jobs ADD COLUMN host TEXT;
ALTER TABLE jobs ADD COLUMN pid_space TEXT;
-- The pid_space of who asked a running job to stop: from another one no signal reaches it.
ALTER TABLE jobs ADD COLUMN asked_from TEXT;
ALTER TABLE leases ADD COLUMN host TEXT;
ALTER TABLE leases ADD COLUMN pid_space TEXT;
