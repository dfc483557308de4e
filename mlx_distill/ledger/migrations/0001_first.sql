-- Times are Unix seconds (REAL), paths are relative to the root, columns of JSON hold valid JSON.

CREATE TABLE data_sets (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    path TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    rows INTEGER NOT NULL CHECK (rows >= 0),
    task TEXT,
    created_at REAL NOT NULL,
    facts TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(facts))
) STRICT;

-- An index of folders: it can be dropped and made again by a scan.
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    recipe TEXT,
    task TEXT,
    state TEXT NOT NULL CHECK (state IN ('unfinished', 'finished', 'damaged')),
    created_at REAL NOT NULL,
    seen_at REAL NOT NULL,
    facts TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(facts))
) STRICT;
CREATE INDEX runs_by_time ON runs (created_at);

CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    title TEXT NOT NULL,
    arguments TEXT NOT NULL CHECK (json_valid(arguments)),
    run_path TEXT,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
    requested TEXT CHECK (requested IN ('pause', 'cancel', 'discard')),
    requested_at REAL,
    position INTEGER,
    pid INTEGER,
    pid_started REAL,
    heartbeat REAL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    exit_code INTEGER,
    error TEXT CHECK (error IS NULL OR json_valid(error)),
    request TEXT CHECK (request IS NULL OR json_valid(request)),
    request_hash TEXT,
    environment TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(environment)),
    result TEXT CHECK (result IS NULL OR json_valid(result)),
    CHECK (state <> 'running' OR started_at IS NOT NULL)
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, position);
CREATE INDEX jobs_by_time ON jobs (created_at);
CREATE INDEX jobs_by_request ON jobs (request_hash) WHERE request_hash IS NOT NULL;

CREATE TABLE job_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_at REAL NOT NULL,
    level TEXT NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT CHECK (data IS NULL OR json_valid(data))
) STRICT;
CREATE INDEX job_events_by_job ON job_events (job_id, id);

CREATE TABLE models (
    name TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    description TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE versions (
    model TEXT NOT NULL REFERENCES models (name),
    number INTEGER NOT NULL CHECK (number > 0),
    sha TEXT NOT NULL,
    path TEXT NOT NULL,
    source_run TEXT,
    state TEXT NOT NULL CHECK (state IN ('READY', 'ARCHIVED', 'FAILED')),
    created_at REAL NOT NULL,
    info TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(info)),
    PRIMARY KEY (model, number)
) STRICT;
CREATE INDEX versions_by_sha ON versions (sha);

-- A deployment of a version, or of an analyzer outside the registry (target).
CREATE TABLE deployments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL REFERENCES models (name),
    alias TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('deploy', 'rollback')),
    previous INTEGER REFERENCES deployments (id),
    version INTEGER,
    target TEXT,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    gate TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(gate)),
    settings TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(settings)),
    created_at REAL NOT NULL,
    CHECK ((version IS NULL) <> (target IS NULL)),
    FOREIGN KEY (model, version) REFERENCES versions (model, number)
) STRICT;
-- The deployments of an alias are one chain: each has one successor, and only one is the first.
CREATE UNIQUE INDEX deployments_after ON deployments (model, alias, previous) WHERE previous IS NOT NULL;
CREATE UNIQUE INDEX deployments_first ON deployments (model, alias) WHERE previous IS NULL;

CREATE TABLE aliases (
    model TEXT NOT NULL REFERENCES models (name),
    alias TEXT NOT NULL,
    version INTEGER,
    target TEXT,
    deployment INTEGER REFERENCES deployments (id),
    PRIMARY KEY (model, alias),
    CHECK ((version IS NULL) <> (target IS NULL)),
    FOREIGN KEY (model, version) REFERENCES versions (model, number)
) STRICT;

CREATE TABLE comparisons (
    id TEXT PRIMARY KEY,
    a TEXT NOT NULL CHECK (json_valid(a)),
    b TEXT NOT NULL CHECK (json_valid(b)),
    result TEXT NOT NULL CHECK (json_valid(result)),
    created_at REAL NOT NULL
) STRICT;
CREATE INDEX comparisons_by_time ON comparisons (created_at);

CREATE TABLE costs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    quantity REAL NOT NULL CHECK (quantity >= 0),
    unit TEXT NOT NULL,
    unit_price REAL CHECK (unit_price >= 0),
    currency TEXT,
    price_date TEXT,
    basis TEXT NOT NULL CHECK (basis IN ('measured', 'estimated')),
    run TEXT,
    -- What was measured, so that nothing is counted twice.
    source TEXT UNIQUE,
    facts TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(facts)),
    created_at REAL NOT NULL,
    CHECK ((unit_price IS NULL) = (currency IS NULL) AND (unit_price IS NULL) = (price_date IS NULL))
) STRICT;
CREATE INDEX costs_by_kind ON costs (kind, created_at);
CREATE INDEX costs_by_run ON costs (run) WHERE run IS NOT NULL;

-- Who uses something that only one process may use at a time.
CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    pid INTEGER NOT NULL,
    pid_started REAL NOT NULL,
    heartbeat REAL NOT NULL,
    purpose TEXT NOT NULL
) STRICT;

-- Uploaded files.
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL CHECK (bytes >= 0),
    sha256 TEXT NOT NULL,
    path TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    status TEXT NOT NULL CHECK (status IN ('uploaded', 'processed', 'error')),
    deleted_at REAL
) STRICT;
CREATE INDEX files_by_time ON files (created_at);

-- What was deployed, compared and spent is never rewritten.
CREATE TRIGGER deployments_keep BEFORE UPDATE ON deployments
BEGIN SELECT RAISE(ABORT, 'deployments are append-only'); END;
CREATE TRIGGER deployments_stay BEFORE DELETE ON deployments
BEGIN SELECT RAISE(ABORT, 'deployments are append-only'); END;
CREATE TRIGGER comparisons_keep BEFORE UPDATE ON comparisons
BEGIN SELECT RAISE(ABORT, 'comparisons are append-only'); END;
CREATE TRIGGER comparisons_stay BEFORE DELETE ON comparisons
BEGIN SELECT RAISE(ABORT, 'comparisons are append-only'); END;
CREATE TRIGGER costs_keep BEFORE UPDATE ON costs
BEGIN SELECT RAISE(ABORT, 'costs are append-only'); END;
CREATE TRIGGER costs_stay BEFORE DELETE ON costs
BEGIN SELECT RAISE(ABORT, 'costs are append-only'); END;
-- A version's number and content are for ever; its state, info and folder may change.
CREATE TRIGGER versions_keep BEFORE UPDATE OF model, number, sha, created_at ON versions
BEGIN SELECT RAISE(ABORT, 'a version keeps its number and its content'); END;
CREATE TRIGGER versions_stay BEFORE DELETE ON versions
BEGIN SELECT RAISE(ABORT, 'versions are archived, never deleted'); END;
