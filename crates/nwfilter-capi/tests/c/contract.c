/*
 * Calls every function with null, with right and with random arguments, as far as the contract allows, and checks what comes
 * back. Prints for each function how often it succeeded and failed.
 *
 *     contract STORE ROUNDS SEED
 */
#include <nwfilter.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                     \
    do {                                                                                \
        if (!(what)) {                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what);    \
            abort();                                                                    \
        }                                                                               \
    } while (0)

/* ---- what is random ---- */

static uint64_t state;

static uint64_t any(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t below(uint64_t bound)
{
    return any() % bound;
}

#define BINDING(port, filter, parameters)                                                                     \
    "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>"           \
    "<portdev name='" port "'/><mac address='52:54:00:7b:35:93'/><filterref filter='" filter "'>" parameters   \
    "</filterref></filterbinding>"

static const char *const TEXTS[] = {
    "",
    "vnet0",
    "vnet1",
    "web",
    "loop",
    "clean-traffic",
    "../passwd",
    "in tcp to :80",
    "out arp request sender 10.0.0.9",
    "in words",
    "\xff\xfe\x80",
    "<filter name='web'><rule action='drop' direction='inout'><all/></rule></filter>",
    "<filter name='web'><filterref filter='no-mac-spoofing'/></filter>",
    "<filter name='web'>\n<rule action='drop' direction='in'><tpc/></rule></filter>",
    "<filter name='web'><rule action='drop' direction='in'><ip srcipaddr='$WHO'/></rule></filter>",
    "<filter name='loop'><filterref filter='loop'/></filter>",
    "<filter name='web'",
    BINDING("vnet0", "web", "<parameter name='IP' value='10.0.0.2'/>"),
    BINDING("vnet1", "clean-traffic", "<parameter name='IP' value='10.0.0.3'/>"),
    BINDING("vnet1", "nothing", ""),
    BINDING("vnet0", "web", "<parameter name='IP' value='10.0.0.256'/>"),
    "<filterset name='web' family='ipv4'><entry value='10.0.0.9'/></filterset>",
    "<filterset name='vnet0' family='ipv4'><include set='web'/></filterset>",
    "<filterset name='loop' family='ipv6'><include set='loop'/></filterset>",
    "<filterset name='web' family='port'><tag name='x'/></filterset>",
    "10.0.0.9\n10.0.0.8 # two\n",
    "10.0.0.9",
    "fd00::1",
    "10.0.0.9\nmany\n",
};

/* Which of them, from there to the next kind. */
enum kind { NAMES = 0, PACKETS = 7, FILTERS = 11, BINDINGS = 17, SETS = 21, ENTRIES = 25 };

/* A text in memory of exactly its size, so that checkers of memory see each byte that is read beside it. */
struct text {
    char *memory;
    size_t length;
};

static struct text text(enum kind kind)
{
    static const size_t END = sizeof TEXTS / sizeof *TEXTS;
    struct text text = {NULL, any()};
    size_t end = kind == NAMES      ? PACKETS
                 : kind == PACKETS  ? FILTERS
                 : kind == FILTERS  ? BINDINGS
                 : kind == BINDINGS ? SETS
                 : kind == SETS     ? ENTRIES
                                    : END;
    const char *source = TEXTS[below(4) ? kind + below(end - kind) : below(END)];
    size_t size = strlen(source);

    switch (below(16)) {
    case 0: /* null, and any length */
        return text;
    case 1: /* more than any text may have, of which nothing is read */
        text.memory = malloc(1);
        text.length |= (size_t)1 << 62;
        text.length -= text.length == NWF_ZERO_TERMINATED;
        return text;
    case 2: /* up to its zero byte */
        text.memory = strdup(source);
        text.length = NWF_ZERO_TERMINATED;
        return text;
    case 3: /* only a part */
        size = below(size + 1);
        break;
    default:
        break;
    }
    text.memory = malloc(size ? size : 1);
    memcpy(text.memory, source, size);
    text.length = size;
    if (size && below(8) == 0)
        for (int changes = 0; changes < 3; changes++)
            text.memory[below(size)] = (char)any();
    return text;
}

/* ---- what is checked of each call ---- */

static const char *names[96];
static unsigned long succeeded[96], failed[96];

static void count(const char *name, int ok)
{
    size_t row = 0;
    while (names[row] && strcmp(names[row], name) != 0)
        row++;
    CHECK(row < 95);
    names[row] = name;
    *(ok ? &succeeded[row] : &failed[row]) += 1;
}

/* An error handle says the same as the code, and can be asked for everything. */
static void inspect(nwf_error *error, nwf_code code)
{
    size_t length = 1;
    /* A structure may be smaller than it has to be, or larger, as that of a newer header. */
    struct { nwf_place known; char newer[24]; } place = {.known = {.size = below(sizeof place + 1)}};
    struct { nwf_diagnostic known; char newer[24]; } diagnostic = {.known = {.size = below(sizeof diagnostic + 1)}};
    if (below(2)) {
        place.known.size = sizeof place.known;
        diagnostic.known.size = sizeof diagnostic.known;
    }

    CHECK((error == NULL) == (code == NWF_OK));
    CHECK(nwf_error_code(error) == code);
    const char *message = nwf_error_message(error, &length);
    count("nwf_error_code", error != NULL);
    count("nwf_error_message", message != NULL);
    CHECK((message == NULL) == (error == NULL));
    CHECK(message == NULL ? length == 0 : strlen(message) == length && length > 0);
    size_t causes = nwf_error_cause_count(error), problems = nwf_error_diagnostic_count(error);
    count("nwf_error_cause_count", causes > 0);
    count("nwf_error_diagnostic_count", problems > 0);
    for (size_t number = 0; number <= causes; number++) {
        const char *cause = nwf_error_cause(error, number, below(2) ? &length : NULL);
        count("nwf_error_cause", cause != NULL);
        CHECK((cause != NULL) == (number < causes));
    }
    CHECK(nwf_error_cause(error, any() | causes, NULL) == NULL);
    int found = nwf_error_place(error, below(8) ? &place.known : NULL);
    count("nwf_error_place", found);
    CHECK(!found || (strlen(place.known.document) == place.known.document_length && place.known.line > 0));
    for (size_t number = 0; number <= problems; number++) {
        found = nwf_error_diagnostic(error, number, below(8) ? &diagnostic.known : NULL);
        count("nwf_error_diagnostic", found);
        CHECK(!found || number < problems);
        if (found) {
            CHECK(diagnostic.known.severity == NWF_WARNING || diagnostic.known.severity == NWF_ERROR);
            CHECK(strlen(diagnostic.known.message) == diagnostic.known.message_length);
        }
    }
    CHECK((problems > 0) == (code == NWF_INVALID_DOCUMENT));
    nwf_error_free(error);
    count("nwf_error_free", error != NULL);
}

static int done(const char *name, nwf_code code, nwf_error **out, nwf_error *error)
{
    CHECK(code >= NWF_OK && code <= NWF_INVALID_SET && code != NWF_PANIC);
    CHECK(strncmp(nwf_code_name(code), "NWF_", 4) == 0);
    count(name, code == NWF_OK);
    if (out)
        inspect(error, code);
    return code == NWF_OK;
}

/* What is handed out is there if and only if the call succeeded. */
static void handed_out(int ok, nwf_text **out, nwf_text *handed)
{
    size_t length = 1;

    if (out) {
        CHECK((handed != NULL) == ok);
        const char *data = nwf_text_data(handed, &length);
        count("nwf_text_data", data != NULL);
        CHECK(data == NULL ? length == 0 : strlen(data) == length);
        nwf_text_free(handed);
        count("nwf_text_free", handed != NULL);
    }
}

/* ---- handles ---- */

enum { SOME = 3 };
static nwf_driver *drivers[SOME];
static nwf_transaction *transactions[SOME];
static nwf_event_queue *queues[SOME];
static const char *store;

static void open_one(size_t at)
{
    char filters[512], bindings[512];
    nwf_options options = {.size = sizeof options, .backend = NWF_BACKEND_FAKE};
    nwf_error *error = (nwf_error *)1, **out = below(4) ? &error : NULL;
    nwf_driver *driver = (nwf_driver *)1, **place = below(8) ? &driver : NULL;
    nwf_code code;

    options.config_dir_length = (size_t)snprintf(filters, sizeof filters, "%s/filters-%zu", store, at);
    options.state_dir_length = (size_t)snprintf(bindings, sizeof bindings, "%s/bindings-%zu", store, at);
    options.config_dir = filters;
    options.state_dir = bindings;
    options.flags = NWF_OPEN_WITHOUT_LEARNER;
    switch (below(10)) {
    case 0:
        options.size = any();
        break;
    case 1:
        options.backend = (int32_t)(any() | 4);
        break;
    case 2:
        options.stores = (int32_t)(any() | 2);
        break;
    case 3:
        options.flags = (uint32_t)any() | 1u << 31;
        break;
    case 4:
        options.config_dir_length = 0;
        break;
    case 5:
        filters[0] = (char)0xff;
        break;
    default:
        break;
    }
    code = nwf_driver_open(&options, place, out);
    if (done("nwf_driver_open", code, out, error)) {
        CHECK(strcmp(nwf_driver_backend(driver), "fake") == 0);
        drivers[at] = driver;
    } else {
        CHECK(place == NULL || driver == NULL);
    }
    count("nwf_driver_backend", nwf_driver_backend(drivers[at]) != NULL);
}

/* ---- one call ---- */

typedef nwf_code document_function(const nwf_driver *, const char *, size_t, const char *, size_t, nwf_text **,
                                   nwf_error **);
typedef nwf_code name_function(const nwf_driver *, const char *, size_t, nwf_error **);
typedef nwf_code lookup_function(const nwf_driver *, const char *, size_t, nwf_text **, nwf_error **);
typedef nwf_code question_function(const nwf_driver *, nwf_text **, nwf_error **);
typedef nwf_code add_function(nwf_transaction *, const char *, size_t, const char *, size_t, nwf_error **);

#define ROW(function) {#function, function}
static const struct { const char *name; document_function *call; } DOCUMENTS[] = {
    ROW(nwf_driver_bind), ROW(nwf_driver_replace), ROW(nwf_driver_ruleset)};
static const struct { const char *name; name_function *call; } NAMED[] = {
    ROW(nwf_driver_undefine), ROW(nwf_driver_unbind), ROW(nwf_driver_undefine_set)};
static const struct { const char *name; lookup_function *call; } LOOKUPS[] = {
    ROW(nwf_driver_filter_xml), ROW(nwf_driver_binding_xml), ROW(nwf_driver_set_xml), ROW(nwf_driver_set_content)};
static const struct { const char *name; question_function *call; } QUESTIONS[] = {
    ROW(nwf_driver_filters), ROW(nwf_driver_bindings), ROW(nwf_driver_reload), ROW(nwf_driver_diff),
    ROW(nwf_driver_status), ROW(nwf_driver_counters), ROW(nwf_driver_metrics), ROW(nwf_driver_openmetrics),
    ROW(nwf_driver_sets)};
static const struct { const char *name; add_function *call; } ADDED[] = {
    ROW(nwf_transaction_bind), ROW(nwf_transaction_replace)};
/* The first of each is given a document, the others entries. */
static const struct { const char *name; document_function *call; } SETS_CHANGED[] = {
    ROW(nwf_driver_define_set), ROW(nwf_driver_add_to_set), ROW(nwf_driver_remove_from_set),
    ROW(nwf_driver_replace_in_set)};
static const struct { const char *name; add_function *call; } SETS_ADDED[] = {
    ROW(nwf_transaction_define_set), ROW(nwf_transaction_add_to_set), ROW(nwf_transaction_remove_from_set),
    ROW(nwf_transaction_replace_in_set)};

static void once(void)
{
    size_t at = below(SOME);
    nwf_driver *driver = drivers[at];
    nwf_transaction *transaction = transactions[below(SOME)];
    nwf_event_queue *queue = queues[below(SOME)];
    uint64_t what = below(21);
    size_t of_sets = below(2) ? 0 : 1 + below(3);
    int makes_filter = what == 1 || what == 2 || what == 13, makes_binding = what == 3 || what == 4 || what == 14;
    struct text first = text(NAMES);
    struct text second = text(makes_filter        ? FILTERS
                              : makes_binding     ? BINDINGS
                              : what < 18         ? PACKETS
                              : of_sets == 0      ? SETS
                                                  : ENTRIES);
    uint32_t flags = (uint32_t)(below(4) ? below(2) : any());
    nwf_error *error = (nwf_error *)1, **out = below(4) ? &error : NULL;
    nwf_text *handed = (nwf_text *)1, **place = below(4) ? &handed : NULL;
    nwf_code code;

    switch (what) {
    case 0:
        if (!driver) {
            open_one(at);
        } else if (below(4) == 0) {
            nwf_driver_free(driver);
            count("nwf_driver_free", 1);
            drivers[at] = NULL;
        }
        break;
    case 1:
    case 2:
        code = nwf_driver_define(driver, first.memory, first.length, second.memory, second.length, flags, place, out);
        handed_out(done("nwf_driver_define", code, out, error), place, handed);
        break;
    case 3:
    case 4: {
        size_t row = below(3);
        code = DOCUMENTS[row].call(driver, first.memory, first.length, second.memory, second.length, place, out);
        handed_out(done(DOCUMENTS[row].name, code, out, error), place, handed);
        break;
    }
    case 5: {
        size_t row = below(3);
        code = NAMED[row].call(driver, first.memory, first.length, out);
        done(NAMED[row].name, code, out, error);
        break;
    }
    case 6: {
        size_t row = below(4);
        code = LOOKUPS[row].call(driver, first.memory, first.length, place, out);
        handed_out(done(LOOKUPS[row].name, code, out, error), place, handed);
        break;
    }
    case 7: {
        size_t row = below(9);
        code = QUESTIONS[row].call(driver, place, out);
        handed_out(done(QUESTIONS[row].name, code, out, error), place, handed);
        break;
    }
    case 8:
        code = nwf_driver_explain(driver, first.memory, first.length, second.memory, second.length, place, out);
        handed_out(done("nwf_driver_explain", code, out, error), place, handed);
        break;
    case 9:
        code = nwf_driver_commit(driver, transaction, place, out);
        handed_out(done("nwf_driver_commit", code, out, error), place, handed);
        CHECK(!driver || nwf_transaction_length(transaction) == 0);
        break;
    case 10:
        code = nwf_driver_plan(driver, transaction, place, out);
        handed_out(done("nwf_driver_plan", code, out, error), place, handed);
        break;
    case 11: {
        nwf_event_queue *made = (nwf_event_queue *)1;
        code = nwf_driver_events(driver, below(8) ? &made : NULL, out);
        if (done("nwf_driver_events", code, out, error)) {
            size_t queue_at = below(SOME);
            nwf_event_queue_free(queues[queue_at]);
            count("nwf_event_queue_free", queues[queue_at] != NULL);
            queues[queue_at] = made;
        }
        break;
    }
    case 12: {
        struct pollfd wait = {.fd = nwf_event_queue_fd(queue), .events = POLLIN};
        count("nwf_event_queue_fd", wait.fd >= 0);
        CHECK((wait.fd >= 0) == (queue != NULL));
        nwf_event event;
        memset(&event, 0x55, sizeof event);
        event.size = below(4) ? sizeof event : below(sizeof event);
        int readable = queue && poll(&wait, 1, 0) == 1;
        code = nwf_event_queue_next(queue, below(8) ? &event : NULL, out);
        if (done("nwf_event_queue_next", code, out, error)) {
            CHECK(readable || event.kind == NWF_EVENT_NONE);
            CHECK(strlen(event.name) == event.name_length && memchr(event.state, 0, sizeof event.state));
            CHECK(event.kind >= NWF_EVENT_NONE && event.kind != NWF_EVENT_OTHER);
            CHECK(strcmp(nwf_event_kind_name(event.kind), "other") != 0);
            count("nwf_event_kind_name", 1);
        }
        break;
    }
    case 13:
        code = nwf_transaction_define(transaction, first.memory, first.length, second.memory, second.length, flags, out);
        done("nwf_transaction_define", code, out, error);
        break;
    case 14: {
        size_t row = below(2);
        code = ADDED[row].call(transaction, first.memory, first.length, second.memory, second.length, out);
        done(ADDED[row].name, code, out, error);
        break;
    }
    case 15:
        if (below(2)) {
            code = nwf_transaction_undefine(transaction, first.memory, first.length, out);
            done("nwf_transaction_undefine", code, out, error);
        } else {
            code = nwf_transaction_unbind(transaction, first.memory, first.length, out);
            done("nwf_transaction_unbind", code, out, error);
        }
        break;
    case 16: {
        size_t transaction_at = below(SOME);
        count("nwf_transaction_length", nwf_transaction_length(transactions[transaction_at]) > 0);
        nwf_transaction_free(transactions[transaction_at]);
        count("nwf_transaction_free", transactions[transaction_at] != NULL);
        transactions[transaction_at] = below(4) ? nwf_transaction_new() : NULL;
        count("nwf_transaction_new", 1);
        break;
    }
    case 17:
        if (below(2)) {
            code = nwf_driver_keep(driver, out);
            done("nwf_driver_keep", code, out, error);
        } else {
            code = nwf_driver_stop_keeping(driver, out);
            done("nwf_driver_stop_keeping", code, out, error);
        }
        break;
    case 18:
        code = SETS_CHANGED[of_sets].call(driver, first.memory, first.length, second.memory, second.length, place, out);
        handed_out(done(SETS_CHANGED[of_sets].name, code, out, error), place, handed);
        break;
    case 19:
        code = SETS_ADDED[of_sets].call(transaction, first.memory, first.length, second.memory, second.length, out);
        done(SETS_ADDED[of_sets].name, code, out, error);
        break;
    case 20:
        if (below(2)) {
            code = nwf_transaction_undefine_set(transaction, first.memory, first.length, out);
            done("nwf_transaction_undefine_set", code, out, error);
        } else {
            code = nwf_transaction_cut_connections(transaction, out);
            done("nwf_transaction_cut_connections", code, out, error);
        }
        break;
    }
    free(first.memory);
    free(second.memory);
}

/* A child refuses the handles of its parent, may free them, and opens a driver of its own. */
static void fork_and_call(void)
{
    nwf_event_queue *queue;
    nwf_event event = {.size = sizeof event};
    nwf_error *error;
    nwf_text *json = (nwf_text *)1;
    nwf_transaction *transaction = nwf_transaction_new();
    int status;

    while (!drivers[0])
        open_one(0);
    CHECK(nwf_driver_events(drivers[0], &queue, &error) == NWF_OK);
    nwf_driver_keep(drivers[0], NULL); /* a thread that the child does not have */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(nwf_driver_status(drivers[0], &json, &error) == NWF_FORKED && json == NULL);
        CHECK(nwf_error_code(error) == NWF_FORKED);
        nwf_error_free(error);
        CHECK(nwf_driver_commit(drivers[0], transaction, NULL, NULL) == NWF_FORKED);
        CHECK(nwf_transaction_undefine(transaction, "web", 3, NULL) == NWF_FORKED);
        CHECK(nwf_event_queue_next(queue, &event, NULL) == NWF_FORKED && nwf_event_queue_fd(queue) == -1);
        nwf_event_queue_free(queue);
        nwf_transaction_free(transaction);
        nwf_driver_free(drivers[0]);
        drivers[0] = NULL;
        while (!drivers[0])
            open_one(0);
        CHECK(nwf_driver_status(drivers[0], &json, NULL) == NWF_OK);
        nwf_text_free(json);
        nwf_driver_free(drivers[0]);
        /* What is the parent's could not be freed. Nobody counts it as a leak when another program begins. */
        execl("/bin/true", "true", (char *)NULL);
        _exit(1);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    /* The parent goes on. */
    CHECK(nwf_event_queue_next(queue, &event, NULL) == NWF_OK);
    nwf_event_queue_free(queue);
    nwf_transaction_free(transaction);
}

int main(int argc, char **argv)
{
    CHECK(argc == 4);
    store = argv[1];
    state = strtoull(argv[3], NULL, 10) * 2654435761u + 88172645463325252u;
    CHECK(nwf_abi_version() == NWF_ABI_VERSION && strlen(nwf_version()) > 0);
    count("nwf_abi_version", 1);
    count("nwf_version", 1);
    CHECK(strcmp(nwf_code_name((int32_t)any() | 64), "NWF_OTHER") == 0);
    count("nwf_code_name", 1);
    for (unsigned long round = strtoul(argv[2], NULL, 10); round > 0; round--)
        once();
    fork_and_call();
    /* Queues and transactions outlive their drivers. */
    for (size_t at = 0; at < SOME; at++)
        nwf_driver_free(drivers[at]);
    for (size_t at = 0; at < SOME; at++) {
        nwf_event event = {.size = sizeof event};
        while (queues[at] && event.kind != NWF_EVENT_CLOSED)
            CHECK(nwf_event_queue_next(queues[at], &event, NULL) == NWF_OK && event.kind != NWF_EVENT_NONE);
        nwf_event_queue_free(queues[at]);
        nwf_transaction_free(transactions[at]);
    }
    nwf_driver_free(NULL);
    count("nwf_driver_free", 0);
    for (size_t row = 0; names[row]; row++)
        printf("%s %lu %lu\n", names[row], succeeded[row], failed[row]);
    return 0;
}
