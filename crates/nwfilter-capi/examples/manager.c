/*
 * A virtualization manager in C: it filters the ports of a guest while the guest runs, and tells what happens.
 *
 *     cc manager.c $(pkg-config --cflags --libs nwfilter) -o manager
 *     manager STORE BACKEND PORT MAC IP [PORT MAC IP]...
 *
 * STORE is a directory for filters and bindings, BACKEND is auto, nftables, xtables or fake, each PORT is a tap device. It
 * ends at the end of its input.
 */
#include <nwfilter.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char FILTER[] =
    "<filter name='web-server'>\n"
    "  <filterref filter='clean-traffic'/>\n"
    "  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>\n"
    "  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>\n"
    "  <rule action='drop' direction='inout'><all/></rule>\n"
    "</filter>\n";

/* Says what went wrong, where and why, and ends the program. */
static void fail(nwf_error *error)
{
    nwf_place place = {.size = sizeof place};

    if (nwf_error_place(error, &place))
        fprintf(stderr, "%s:%u: ", place.document, place.line);
    fprintf(stderr, "%s: %s\n", nwf_code_name(nwf_error_code(error)), nwf_error_message(error, NULL));
    for (size_t number = 0; number < nwf_error_cause_count(error); number++)
        fprintf(stderr, "  because: %s\n", nwf_error_cause(error, number, NULL));
    nwf_error_free(error);
    exit(1);
}

static nwf_driver *open_driver(const char *store, const char *backend)
{
    static const char *const BACKENDS[] = {"auto", "nftables", "xtables", "fake"};
    char filters[4096], bindings[4096];
    nwf_options options = {.size = sizeof options, .backend = -1};
    nwf_driver *driver;
    nwf_error *error;

    snprintf(filters, sizeof filters, "%s/filters", store);
    snprintf(bindings, sizeof bindings, "%s/bindings", store);
    options.config_dir = filters;
    options.config_dir_length = NWF_ZERO_TERMINATED;
    options.state_dir = bindings;
    options.state_dir_length = NWF_ZERO_TERMINATED;
    for (int32_t number = 0; number < 4; number++)
        if (strcmp(backend, BACKENDS[number]) == 0)
            options.backend = number;
    if (nwf_driver_open(&options, &driver, &error) != NWF_OK)
        fail(error);
    return driver;
}

/* Before the guest runs: defines its filter and binds all of its ports, or changes nothing. */
static void start(nwf_driver *driver, char **ports, int count)
{
    nwf_transaction *transaction = nwf_transaction_new();
    nwf_text *report;
    nwf_error *error;
    char binding[1024];

    if (nwf_transaction_define(transaction, "web-server.xml", NWF_ZERO_TERMINATED, FILTER, sizeof FILTER - 1, 0,
                               &error) != NWF_OK)
        fail(error);
    for (int at = 0; at < count; at += 3) {
        int length = snprintf(binding, sizeof binding,
                              "<filterbinding>"
                              "<owner><name>guest</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>"
                              "<portdev name='%s'/><mac address='%s'/>"
                              "<filterref filter='web-server'><parameter name='IP' value='%s'/></filterref>"
                              "</filterbinding>",
                              ports[at], ports[at + 1], ports[at + 2]);
        if (nwf_transaction_replace(transaction, ports[at], strlen(ports[at]), binding, (size_t)length, &error) !=
            NWF_OK)
            fail(error);
    }
    if (nwf_driver_commit(driver, transaction, &report, &error) != NWF_OK)
        fail(error);
    printf("done: %s\n", nwf_text_data(report, NULL));
    nwf_text_free(report);
    nwf_transaction_free(transaction);
}

/* When the guest is gone. */
static void stop(nwf_driver *driver, char **ports, int count)
{
    nwf_transaction *transaction = nwf_transaction_new();
    nwf_error *error;

    for (int at = 0; at < count; at += 3)
        if (nwf_transaction_unbind(transaction, ports[at], strlen(ports[at]), &error) != NWF_OK)
            fail(error);
    if (nwf_driver_commit(driver, transaction, NULL, &error) != NWF_OK)
        fail(error);
    nwf_transaction_free(transaction);
}

/* Prints the events that wait. */
static void tell(nwf_event_queue *queue)
{
    nwf_event event;
    nwf_error *error;

    for (;;) {
        event.size = sizeof event;
        if (nwf_event_queue_next(queue, &event, &error) != NWF_OK)
            fail(error);
        if (event.kind == NWF_EVENT_NONE || event.kind == NWF_EVENT_CLOSED)
            return;
        printf("%s %s\n", nwf_event_kind_name(event.kind), event.name);
    }
}

int main(int argc, char **argv)
{
    nwf_driver *driver;
    nwf_event_queue *queue;
    nwf_error *error;

    if (argc < 6 || argc % 3 != 0) {
        fprintf(stderr, "usage: manager STORE BACKEND PORT MAC IP [PORT MAC IP]...\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    driver = open_driver(argv[1], argv[2]);
    if (nwf_driver_events(driver, &queue, &error) != NWF_OK)
        fail(error);
    start(driver, argv + 3, argc - 3);
    printf("the guest may run, filtered by %s\n", nwf_driver_backend(driver));

    /* Any main loop will do: the events have a file descriptor. */
    struct pollfd wait[] = {{.fd = nwf_event_queue_fd(queue), .events = POLLIN}, {.fd = 0, .events = POLLIN}};
    char input[64];
    do {
        poll(wait, 2, -1);
        if (wait[0].revents)
            tell(queue);
    } while (!wait[1].revents || read(0, input, sizeof input) > 0);

    stop(driver, argv + 3, argc - 3);
    tell(queue);
    nwf_event_queue_free(queue);
    nwf_driver_free(driver);
    return 0;
}
