/*
 * Eight threads change and read through one driver, while the main thread follows the events.
 *
 *     threads STORE BACKEND OPERATIONS PORT...      with as many ports as threads
 *
 * BACKEND is fake, nftables, or owner, which is nftables with a table of its own.
 */
#include <nwfilter.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 8 };

#define CHECK(what)                                                                     \
    do {                                                                                \
        if (!(what)) {                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what);    \
            abort();                                                                    \
        }                                                                               \
    } while (0)

static nwf_driver *driver;
static int operations;

static void ok(nwf_code code, nwf_error *error)
{
    if (code != NWF_OK) {
        fprintf(stderr, "%s: %s\n", nwf_code_name(code), nwf_error_message(error, NULL));
        for (size_t number = 0; number < nwf_error_cause_count(error); number++)
            fprintf(stderr, "  because: %s\n", nwf_error_cause(error, number, NULL));
        abort();
    }
}

static size_t binding(char *text, size_t size, const char *port, int host)
{
    return (size_t)snprintf(
        text, size,
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>"
        "<portdev name='%s'/><mac address='52:54:00:7b:35:93'/>"
        "<filterref filter='only'><parameter name='IP' value='10.0.0.%d'/></filterref></filterbinding>",
        port, host);
}

/* Binds, replaces, reads and unbinds a port in turn. */
static void *work(void *argument)
{
    const char *port = argument;
    char text[1024];
    nwf_error *error;
    nwf_text *xml;

    for (int number = 0; number < operations / THREADS; number++) {
        size_t length = binding(text, sizeof text, port, 1 + number % 250);
        switch (number % 4) {
        case 0:
            ok(nwf_driver_bind(driver, NULL, 0, text, length, NULL, &error), error);
            break;
        case 1:
            ok(nwf_driver_replace(driver, NULL, 0, text, length, NULL, &error), error);
            break;
        case 2:
            ok(nwf_driver_binding_xml(driver, port, NWF_ZERO_TERMINATED, &xml, &error), error);
            CHECK(strstr(nwf_text_data(xml, NULL), port));
            nwf_text_free(xml);
            break;
        case 3:
            ok(nwf_driver_unbind(driver, port, NWF_ZERO_TERMINATED, &error), error);
            break;
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static const char FILTER[] = "<filter name='only'>"
                                 "<rule action='accept' direction='out'><ip srcipaddr='$IP'/></rule>"
                                 "<rule action='drop' direction='out'><mac/></rule></filter>";
    char filters[512], bindings[512];
    nwf_options options = {.size = sizeof options};
    nwf_error *error;
    nwf_event_queue *queue;
    nwf_text *json;
    pthread_t threads[THREADS];
    uint64_t events = 0;

    CHECK(argc == 4 + THREADS);
    options.config_dir_length = (size_t)snprintf(filters, sizeof filters, "%s/filters", argv[1]);
    options.state_dir_length = (size_t)snprintf(bindings, sizeof bindings, "%s/bindings", argv[1]);
    options.config_dir = filters;
    options.state_dir = bindings;
    options.backend = strcmp(argv[2], "fake") == 0 ? NWF_BACKEND_FAKE : NWF_BACKEND_NFTABLES;
    options.flags = strcmp(argv[2], "owner") == 0 ? NWF_OPEN_OWNER : 0;
    operations = atoi(argv[3]);
    CHECK(operations % (4 * THREADS) == 0);
    ok(nwf_driver_open(&options, &driver, &error), error);
    ok(nwf_driver_define(driver, NULL, 0, FILTER, sizeof FILTER - 1, 0, NULL, &error), error);
    ok(nwf_driver_events(driver, &queue, &error), error);
    for (int at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, work, argv[4 + at]) == 0);

    /* Of four operations, three are told. */
    struct pollfd wait = {.fd = nwf_event_queue_fd(queue), .events = POLLIN};
    while (events < (uint64_t)operations / 4 * 3) {
        nwf_event event = {.size = sizeof event};
        CHECK(poll(&wait, 1, 60000) == 1);
        do {
            event.size = sizeof event;
            ok(nwf_event_queue_next(queue, &event, &error), error);
            events += event.kind == NWF_EVENT_LOST ? event.lost : event.kind != NWF_EVENT_NONE;
        } while (event.kind != NWF_EVENT_NONE);
    }
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
    CHECK(events == (uint64_t)operations / 4 * 3);
    ok(nwf_driver_bindings(driver, &json, &error), error);
    CHECK(strcmp(nwf_text_data(json, NULL), "[]") == 0);
    nwf_text_free(json);
    ok(nwf_driver_diff(driver, &json, &error), error);
    CHECK(strstr(nwf_text_data(json, NULL), "\"differences\":[]"));
    nwf_text_free(json);
    nwf_event_queue_free(queue);
    nwf_driver_free(driver);
    printf("%d operations\n", operations);
    return 0;
}
